"""Who runs next: first come first served, slots and budget respected, books that balance after anything."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from app.engine.request import Event, FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprobs
from app.engine.scheduler import BURST_SHARES, Scheduler
from app.engine.sequence import Forced, RowEnd, StepPlan, StepResult
from app.engine.share import FIRST_SHARE, LEAST_SHARE, PrefillShare

STOP = 9


def request(
    request_id: str, length: int = 3, max_tokens: int = 2, n: int = 1, logprobs: int | None = None
) -> GenerationRequest:
    return GenerationRequest(request_id, (1,) * length, SamplingParams(), max_tokens, (STOP,), n, logprobs)


def carry_out(plan: StepPlan, token: int = 1) -> StepResult:
    """What a runner would answer: the same token for every row, log-probabilities where they are wanted."""
    slices = {
        index: (TokenLogprobs(-1.0),) * (chunk.end - max(chunk.start, chunk.prefill.num_reported))
        for index, chunk in enumerate(plan.chunks)
        if chunk.wants_logprobs
    }
    return StepResult([token] * len(plan.rows), prompt_logprobs=slices)


def step(scheduler: Scheduler, token: int = 1) -> tuple[StepPlan, list[Event]]:
    plan = scheduler.plan()
    events = scheduler.commit(plan, carry_out(plan, token))
    scheduler.check_integrity()
    return plan, events


def ids(plan: StepPlan) -> list[str]:
    return [sequence.request.request_id for sequence in plan.rows]


def spans(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.prefill.request.request_id, chunk.start, chunk.end) for chunk in plan.chunks]


def test_prefill_leaves_out_the_last_prompt_token_and_decodes_in_the_same_step() -> None:
    scheduler = Scheduler(2, 8)
    scheduler.add(request("a", length=4))
    plan, events = step(scheduler)
    assert spans(plan) == [("a", 0, 3)]
    assert ids(plan) == ["a"]
    assert [event.token_id for event in events if isinstance(event, TokenEvent)] == [1]


def test_a_prompt_of_one_token_needs_no_prefill_but_a_fresh_slot() -> None:
    scheduler = Scheduler(2, 8)
    scheduler.add(request("a", length=1))
    plan, _ = step(scheduler)
    assert plan.chunks == ()
    assert plan.fresh == (plan.rows[0].slot,)
    assert ids(plan) == ["a"]


def test_a_long_prompt_is_cut_to_the_budget_and_running_rows_go_on() -> None:
    scheduler = Scheduler(2, 4)
    scheduler.add(request("short", length=2, max_tokens=9))
    scheduler.add(request("long", length=10, max_tokens=9))
    plans = [step(scheduler)[0] for _ in range(3)]
    assert [spans(plan) for plan in plans] == [
        [("short", 0, 1), ("long", 0, 3)],
        [("long", 3, 7)],
        [("long", 7, 9)],
    ]
    assert [ids(plan) for plan in plans] == [["short"], ["short"], ["short", "long"]]
    assert [len(plan.fresh) for plan in plans] == [2, 0, 0]


def test_several_prompts_share_the_budget_in_order_of_arrival() -> None:
    scheduler = Scheduler(4, 10)
    for name in "abcd":
        scheduler.add(request(name, length=5))
    plan, _ = step(scheduler)
    assert spans(plan) == [("a", 0, 4), ("b", 0, 4), ("c", 0, 2)]
    assert scheduler.num_waiting == 1


def test_nobody_overtakes_a_request_that_waits_for_more_slots() -> None:
    scheduler = Scheduler(3, 100)
    scheduler.add(request("a", max_tokens=3))
    step(scheduler)
    scheduler.add(request("big", n=3))
    scheduler.add(request("small"))
    assert [ids(step(scheduler)[0]) for _ in range(3)] == [["a"], ["a"], ["big"] * 3]
    assert scheduler.num_waiting == 1


def test_a_plan_names_the_requests_that_it_admits_once() -> None:
    scheduler = Scheduler(2, 8)
    for name in ("a", "b", "c"):
        scheduler.add(request(name))
    plans = []
    while scheduler.has_work:
        plans.append(step(scheduler)[0])
    assert [[admitted.request_id for admitted in plan.admitted] for plan in plans] == [["a", "b"], [], ["c"], []]


def test_the_lowest_priority_waits_least_and_displaces_nobody() -> None:
    scheduler = Scheduler(2, 8)
    scheduler.add(request("runs", max_tokens=3, n=2))
    step(scheduler)
    for name, priority in [("c", 0), ("e", 5), ("a", -1), ("d", 0), ("b", -1), ("f", 5)]:
        scheduler.add(dataclasses.replace(request(name, max_tokens=1, n=2), priority=priority))
    admitted = []
    while scheduler.has_work:
        plan, _ = step(scheduler)
        admitted += sorted(set(ids(plan)))
    assert admitted == ["runs", "runs", *"abcdef"]


def test_samples_share_one_prefill_and_fork_when_it_is_done() -> None:
    scheduler = Scheduler(4, 2)
    scheduler.add(request("a", length=4, n=3))
    first, _ = step(scheduler)
    assert first.forks == ()
    assert scheduler.num_running == 3
    second, _ = step(scheduler)
    slots = [sequence.slot for sequence in second.rows]
    assert second.forks == ((slots[0], slots[1]), (slots[0], slots[2]))
    assert len(set(slots)) == 3


def test_rows_are_the_same_object_while_nobody_comes_or_goes() -> None:
    scheduler = Scheduler(2, 8)
    scheduler.add(request("a", max_tokens=4))
    first, _ = step(scheduler)
    second, _ = step(scheduler)
    assert second.rows is first.rows
    scheduler.add(request("b"))
    third, _ = step(scheduler)
    assert third.rows is not second.rows


def test_a_stop_token_is_delivered_and_ends_the_row() -> None:
    scheduler = Scheduler(1, 8)
    scheduler.add(request("a", max_tokens=5))
    step(scheduler)
    _, events = step(scheduler, token=STOP)
    assert events == [TokenEvent("a", 0, STOP, None, FinishReason.STOP, STOP)]
    assert not scheduler.has_work


def test_a_stop_token_that_is_also_the_last_allowed_counts_as_stop() -> None:
    scheduler = Scheduler(1, 8)
    scheduler.add(request("a", max_tokens=1))
    _, events = step(scheduler, token=STOP)
    assert events == [TokenEvent("a", 0, STOP, None, FinishReason.STOP, STOP)]


def test_max_tokens_zero_ends_after_the_prompt_without_a_row() -> None:
    scheduler = Scheduler(1, 2)
    scheduler.add(request("a", length=4, max_tokens=0, logprobs=0))
    first, events = step(scheduler)
    second, more = step(scheduler)
    assert (first.rows, second.rows) == ((), ())
    assert [event.start for event in [*events, *more[:1]]] == [1, 3]  # type: ignore[union-attr]
    assert more[1:] == [TokenEvent("a", 0, None, finish_reason=FinishReason.LENGTH)]


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_frees_the_slots_while_waiting_prefilling_and_decoding(num_steps: int) -> None:
    scheduler = Scheduler(3, 4)
    scheduler.add(request("a", length=10, max_tokens=9, n=2))
    for _ in range(num_steps):
        step(scheduler)
    assert scheduler.abort("a") == [
        TokenEvent("a", sample, None, finish_reason=FinishReason.ABORT) for sample in (0, 1)
    ]
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.has_work) == (0, 0, False)
    assert scheduler.abort("a") == []


def test_the_state_of_a_prefill_outlives_the_abort_of_its_first_sample() -> None:
    scheduler = Scheduler(2, 4)
    scheduler.add(request("a", length=8, n=2))
    first, _ = step(scheduler)
    scheduler.abort("a", 0)
    scheduler.check_integrity()
    second, _ = step(scheduler)
    assert second.fresh == ()
    assert [sequence.slot for sequence in second.rows] == list(first.fresh)
    assert scheduler.num_running == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("b", n=4), "n = 4 is not between 1 and 3"),
        (request("b", n=0), "n = 0"),
        (request("b", length=0), "empty"),
        (request("a"), "live already"),
    ],
)
def test_what_can_never_run_is_refused(bad: GenerationRequest, message: str) -> None:
    scheduler = Scheduler(3, 4)
    scheduler.add(request("a"))
    with pytest.raises(ValueError, match=message):
        scheduler.add(bad)
    scheduler.check_integrity()


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="prefill_budget"):
        Scheduler(1, 0)


def test_after_recovery_every_sequence_is_computed_again_alone() -> None:
    scheduler = Scheduler(4, 8)
    scheduler.add(request("a", length=3, max_tokens=9))
    scheduler.add(request("b", length=4, max_tokens=9))
    step(scheduler)
    step(scheduler)
    scheduler.add(request("c", length=2, max_tokens=9))
    scheduler.plan()
    scheduler.recover()
    scheduler.check_integrity()
    plans = [step(scheduler)[0] for _ in range(4)]
    # two tokens have been drawn; the last of them goes through decode
    assert [spans(plan) for plan in plans] == [[("a", 0, 4)], [("b", 0, 5)], [("c", 0, 1)], []]
    assert [ids(plan) for plan in plans] == [["a"], ["b"], ["c"], ["a", "b", "c"]]
    assert [plan.is_solo for plan in plans] == [True, True, True, False]


# --- one step ahead


def test_a_row_whose_last_token_is_in_flight_is_not_planned_again() -> None:
    scheduler = Scheduler(2, 8)
    scheduler.add(request("a", max_tokens=2))
    scheduler.add(request("b", max_tokens=3))
    plans = [scheduler.plan()]
    for _ in range(3):
        plans.append(scheduler.plan())
        scheduler.check_integrity()
        scheduler.commit(plans[-2], carry_out(plans[-2]))
        scheduler.check_integrity()
    assert [ids(plan) for plan in plans] == [["a", "b"], ["a", "b"], ["b"], []]
    assert plans[3].is_empty
    assert not scheduler.has_work


def test_what_is_drawn_after_a_stop_token_is_ignored_and_the_slot_goes_to_the_next_at_once() -> None:
    scheduler = Scheduler(1, 8)
    scheduler.add(request("a", max_tokens=9))
    first = scheduler.plan()
    second = scheduler.plan()
    slot = second.rows[0].slot
    assert second.rows is first.rows
    assert [event.finish_reason for event in scheduler.commit(first, carry_out(first, STOP))] == [FinishReason.STOP]  # type: ignore[union-attr]
    scheduler.add(request("b"))
    third = scheduler.plan()
    assert third.fresh == (slot,)
    assert ids(third) == ["b"]
    assert scheduler.commit(second, carry_out(second)) == []
    scheduler.check_integrity()
    assert len(scheduler.commit(third, carry_out(third))) == 1


def test_a_prompt_whose_end_is_in_flight_is_recovered_as_a_prompt() -> None:
    scheduler = Scheduler(4, 4)
    scheduler.add(request("a", length=7, n=2, logprobs=0))
    first = scheduler.plan()
    second = scheduler.plan()
    assert [spans(plan) for plan in (first, second)] == [[("a", 0, 4)], [("a", 4, 6)]]
    scheduler.commit(first, carry_out(first))
    third = scheduler.plan()
    assert ids(third) == ["a", "a"]
    scheduler.abort("a", 0)
    scheduler.recover()
    scheduler.check_integrity()
    plans = [step(scheduler) for _ in range(2)]
    assert [spans(plan) for plan, _ in plans] == [[("a", 0, 4)], [("a", 4, 6)]]
    # the log-probabilities of the first four had been delivered
    assert [[getattr(event, "start", None) for event in events] for _, events in plans] == [[], [5, None]]
    assert [sequence.sample for sequence in plans[1][0].rows] == [1]


def test_ends_leave_nothing_behind_of_rows_that_might_have_gone_on_for_long() -> None:
    scheduler = Scheduler(2, 8)
    for index in range(100):
        scheduler.add(request(f"r{index}", max_tokens=10**6 + index))
        step(scheduler)
        scheduler.abort(f"r{index}")
    assert scheduler._last_plans == {}


# --- tokens that are certain


def force(scheduler: Scheduler, plan: StepPlan, *tokens: int, end: RowEnd | None = None) -> list[int | None]:
    """Book these for the first row of a launched step; returns them, and None for an end without a token."""
    events = scheduler.force(plan, {0: Forced(tokens, end)})
    scheduler.check_integrity()
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def lacking(plan: StepPlan) -> list[tuple[str, list[int]]]:
    return [(c.prefill.request.request_id, c.prefill.tokens[c.start : c.end].tolist()) for c in plan.missing]


def test_forced_tokens_are_told_at_once_and_taken_with_the_next_step() -> None:
    scheduler = Scheduler(2, 8)
    scheduler.add(request("a", max_tokens=6))
    scheduler.add(request("b", max_tokens=4))
    first = scheduler.plan()
    assert force(scheduler, first, 5, 6, 7) == [5, 6, 7]
    second = scheduler.plan()
    assert second.rows is first.rows
    assert lacking(second) == [("a", [5, 6])]
    assert (second.rows[0].next_token, second.rows[0].position) == (7, 6)
    # what was drawn for it does not count, what the other drew does
    events = scheduler.commit(first, dataclasses.replace(carry_out(first), forced={0}))
    assert [event.request_id for event in events] == ["b"]
    third = scheduler.plan()
    assert lacking(third) == []
    fourth = scheduler.plan()
    assert [ids(plan) for plan in (second, third, fourth)] == [["a", "b"]] * 3
    assert scheduler.plan().is_empty
    for plan in (second, third, fourth):
        scheduler.commit(plan, carry_out(plan))
        scheduler.check_integrity()
    assert not scheduler.has_work


def test_the_end_may_be_certain_as_well() -> None:
    scheduler = Scheduler(4, 20)
    for name in "abcd":
        scheduler.add(request(name, max_tokens=3))
    plan = scheduler.plan()
    error = RowEnd(FinishReason.INVALID, "nothing follows")
    runs = [Forced((5, STOP, 6)), Forced((5, 6, 7, 8)), Forced((5,), RowEnd(FinishReason.STOP)), Forced((5,), error)]
    events = scheduler.force(plan, dict(enumerate(runs)))
    assert [
        (e.request_id, e.token_id, e.finish_reason, e.stop_reason) for e in events if isinstance(e, TokenEvent)
    ] == [
        ("a", 5, None, None),
        ("a", STOP, FinishReason.STOP, STOP),
        ("b", 5, None, None),
        ("b", 6, None, None),
        ("b", 7, FinishReason.LENGTH, None),
        ("c", 5, None, None),
        ("c", None, FinishReason.STOP, None),
        ("d", 5, None, None),
        ("d", None, FinishReason.INVALID, None),
    ]
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.commit(plan, dataclasses.replace(carry_out(plan), forced=range(4))) == []


@pytest.mark.parametrize("is_late", [False, True])
def test_whoever_is_aborted_lacks_nothing(is_late: bool) -> None:
    scheduler = Scheduler(2, 8)
    scheduler.add(request("a", max_tokens=9))
    plan = scheduler.plan()
    if not is_late:
        scheduler.abort("a")
    assert force(scheduler, plan, 5, 6) == ([5, 6] if is_late else [])
    scheduler.abort("a")
    assert scheduler.plan().is_empty
    scheduler.check_integrity()


@pytest.mark.parametrize("num_steps", [0, 2])
def test_after_recovery_a_prompt_has_its_forced_tokens_behind_it(num_steps: int) -> None:
    scheduler = Scheduler(2, 20)
    scheduler.add(request("a", length=4, max_tokens=9, n=2))
    for _ in range(num_steps):
        step(scheduler)
    plan = scheduler.plan()
    assert force(scheduler, plan, 5, 6, 7) == [5, 6, 7]
    scheduler.plan()
    scheduler.recover()
    scheduler.check_integrity()
    plans = [step(scheduler)[0] for _ in range(3)]
    assert [[c.prefill.tokens[c.start : c.end].tolist() for c in plan.chunks] for plan in plans[:2]] == [
        [[1] * (4 + num_steps) + [5, 6]],
        [[1] * (4 + num_steps - 1)],
    ]
    assert [lacking(plan) for plan in plans] == [[], [], []]
    assert [plan.is_solo for plan in plans] == [True, True, False]


def test_tokens_wait_while_others_are_tried_alone() -> None:
    scheduler = Scheduler(2, 20)
    for name in "ab":
        scheduler.add(request(name, max_tokens=9))
    step(scheduler)
    scheduler.recover()
    alone = scheduler.plan()
    assert force(scheduler, alone, 5, 6, 7) == [5, 6, 7]
    scheduler.commit(alone, dataclasses.replace(carry_out(alone), forced={0}))
    assert [(ids(plan), lacking(plan)) for plan, _ in (step(scheduler) for _ in range(2))] == [
        (["b"], []),
        (["a", "b"], [("a", [5, 6])]),
    ]


# --- prompts beside rows


def answer(plan: StepPlan, seconds_per_token: float, decode_seconds: float) -> StepResult:
    """As ``carry_out``, from a device of that speed."""
    return dataclasses.replace(
        carry_out(plan), prefill_seconds=seconds_per_token * plan.num_prefill_tokens, decode_seconds=decode_seconds
    )


def start_rows(scheduler: Scheduler, count: int) -> None:
    for index in range(count):
        scheduler.add(request(f"row{index}", max_tokens=10**6))
    while scheduler.num_waiting or not scheduler._running:
        step(scheduler)


def test_beside_many_rows_a_long_prompt_takes_as_long_a_share_of_a_step_as_they_do() -> None:
    scheduler = Scheduler(64, 8192)
    start_rows(scheduler, 32)
    scheduler.add(request("long", length=100_000))
    sizes = []
    for _ in range(30):
        plan = scheduler.plan()
        sizes.append(plan.num_prefill_tokens)
        scheduler.commit(plan, answer(plan, 1e-5, 2.5e-3))
    assert sizes[0] == FIRST_SHARE
    assert sizes[10:] == [256] * 20


def test_a_share_is_not_cut_for_what_every_share_costs() -> None:
    scheduler = Scheduler(64, 8192)
    start_rows(scheduler, 32)
    scheduler.add(request("long", length=1_000_000))
    sizes = []
    for _ in range(60):
        plan = scheduler.plan()
        sizes.append(plan.num_prefill_tokens)
        seconds = 2e-3 + 1e-6 * plan.num_prefill_tokens
        scheduler.commit(plan, dataclasses.replace(carry_out(plan), prefill_seconds=seconds, decode_seconds=0.4e-3))
    # 2 ms for nothing: a prompt token more costs a microsecond, and 512 of them a quarter of that
    assert min(sizes[5:]) >= 512
    assert max(sizes) <= 2048


@pytest.mark.parametrize("num_prompts", [1, 40])
def test_steps_with_one_prompt_or_many_teach_what_a_long_one_costs(num_prompts: int) -> None:
    scheduler = Scheduler(64, 8192)
    start_rows(scheduler, 20)
    for index in range(num_prompts):
        scheduler.add(request(f"short{index}", length=32, max_tokens=10**6))
    while scheduler.num_waiting:
        plan = scheduler.plan()
        scheduler.commit(plan, answer(plan, 4e-6, 1e-3))
    scheduler.add(request("long", length=100_000))
    assert scheduler.plan().num_prefill_tokens == 256


def test_steps_that_are_no_measure_teach_nothing() -> None:
    scheduler = Scheduler(64, 8192)
    for index in range(40):
        scheduler.add(request(f"row{index}", length=32, max_tokens=10**6))
    while scheduler.num_waiting or not scheduler._running:
        plan = scheduler.plan()
        scheduler.commit(plan, dataclasses.replace(carry_out(plan), prefill_seconds=0.0, decode_seconds=1e-3))
    scheduler.add(request("long", length=100_000))
    sizes = []
    for _ in range(30):
        plan = scheduler.plan()
        sizes.append(plan.num_prefill_tokens)
        scheduler.commit(plan, answer(plan, 4e-6, 1e-3))
    # 250 tokens take as long as the rows
    assert sizes[10:] == [256] * 20


def test_a_burst_of_prompts_is_taken_at_once_though_rows_run() -> None:
    scheduler = Scheduler(300, 8192)
    start_rows(scheduler, 10)
    for index in range(256):
        scheduler.add(request(f"burst{index}", length=32))
    plan, _ = step(scheduler)
    assert plan.num_prefill_tokens == 256 * 31
    assert len(plan.rows) == 266


@pytest.mark.parametrize(
    ("num_starting", "num_shares"), [(1, 1), (4, 1), (6, 1), (7, BURST_SHARES), (40, BURST_SHARES)]
)
def test_several_that_start_get_more_than_one_does(num_starting: int, num_shares: int) -> None:
    scheduler = Scheduler(300, 8192)
    start_rows(scheduler, 40)
    for index in range(num_starting):
        scheduler.add(request(f"next{index}", length=5000))
    share = scheduler._share.num_tokens
    assert step(scheduler)[0].num_prefill_tokens == num_shares * share


def test_a_budget_is_the_most_that_a_burst_gets() -> None:
    scheduler = Scheduler(300, 1000)
    start_rows(scheduler, 40)
    for index in range(20):
        scheduler.add(request(f"next{index}", length=5000))
    assert step(scheduler)[0].num_prefill_tokens == 1000


def test_prompts_that_wait_for_a_slot_do_not_count_as_starting() -> None:
    scheduler = Scheduler(33, 8192)
    start_rows(scheduler, 32)
    for index in range(100):
        scheduler.add(request(f"long{index}", length=5000))
    assert step(scheduler)[0].num_prefill_tokens == FIRST_SHARE


def test_alone_a_prompt_gets_the_whole_budget() -> None:
    scheduler = Scheduler(4, 8192)
    scheduler.add(request("long", length=20_000))
    assert step(scheduler)[0].num_prefill_tokens == 8192


@pytest.mark.parametrize(("seconds_per_token", "expected"), [(1e-2, LEAST_SHARE), (1e-9, 8192)])
def test_the_share_stays_within_bounds(seconds_per_token: float, expected: int) -> None:
    share = PrefillShare(8192)
    for _ in range(40):
        share.observe(share.num_tokens, seconds_per_token * share.num_tokens, 2e-3)
    assert share.num_tokens == expected


def test_a_step_that_took_less_than_its_share_does_not_raise_it() -> None:
    share = PrefillShare(8192)
    share.observe(10, 1e-6, 2e-3)
    assert share.num_tokens == FIRST_SHARE
    share.observe(10, 1.0, 2e-3)
    assert share.num_tokens < FIRST_SHARE


def test_what_was_not_measured_teaches_nothing() -> None:
    share = PrefillShare(8192)
    share.observe(512, 0.0, 0.0)
    assert share.num_tokens == FIRST_SHARE


@dataclasses.dataclass(frozen=True)
class Flight:
    """A step between launch and collection; the answer is fixed when it is launched."""

    plan: StepPlan
    result: StepResult


class Books(RuleBasedStateMachine):
    """Any order of adding, aborting, stepping and failing keeps the books, and every sample ends exactly once."""

    overlaps = False
    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(num_slots=4, prefill_budget=5)
        self.open: set[tuple[str, int]] = set()
        self.num_tokens: dict[tuple[str, int], int] = {}
        self.limits: dict[str, int] = {}
        self.flights: list[Flight] = []

    @rule(
        target=names,
        length=st.integers(1, 14),
        max_tokens=st.integers(0, 5),
        n=st.integers(1, 4),
        logprobs=st.none() | st.just(0),
    )
    def add(self, length: int, max_tokens: int, n: int, logprobs: int | None) -> str:
        name = f"r{len(self.limits)}"
        self.limits[name] = max_tokens
        self.open |= {(name, sample) for sample in range(n)}
        self.scheduler.add(request(name, length, max_tokens, n, logprobs))
        return name

    @rule(name=names)
    def abort(self, name: str) -> None:
        self.take(self.scheduler.abort(name))
        assert all(key[0] != name for key in self.open)

    @rule(name=names, sample=st.integers(0, 3))
    def abort_sample(self, name: str, sample: int) -> None:
        self.take(self.scheduler.abort(name, sample))
        assert (name, sample) not in self.open

    @rule(token=st.sampled_from([1, 1, 1, STOP]))
    def step(self, token: int) -> None:
        plan = self.plan()
        self.fly(Flight(plan, carry_out(plan, token)))

    @rule(data=st.data())
    def step_with_broken_row(self, data: st.DataObject) -> None:
        plan = self.plan()
        good = carry_out(plan)
        broken = frozenset(data.draw(st.lists(st.integers(0, 3), max_size=2))) & set(range(len(plan.rows)))
        slices = dict(good.prompt_logprobs)
        if slices and data.draw(st.booleans()):
            slices[min(slices)] = None
        self.fly(Flight(plan, StepResult(good.tokens, broken, prompt_logprobs=slices)))

    @rule(data=st.data())
    def step_with_forced_tokens(self, data: st.DataObject) -> None:
        plan = self.plan()
        ends = st.none() | st.just(RowEnd(FinishReason.STOP))
        runs = st.builds(Forced, st.lists(st.sampled_from([1, 1, 1, STOP]), min_size=1, max_size=4).map(tuple), ends)
        # the log-probabilities of a prompt come before its tokens
        rows = [row for row, sequence in enumerate(plan.rows) if sequence.request.prompt_logprobs is None]
        chosen = data.draw(st.dictionaries(st.sampled_from(rows), runs)) if rows else {}
        self.fly(Flight(plan, dataclasses.replace(carry_out(plan), forced=chosen)))

    @rule(fails=st.booleans())
    def step_raises(self, fails: bool) -> None:
        plans = [*(flight.plan for flight in self.flights), self.plan()]
        self.flights = []
        if fails:
            for plan in plans:
                self.take(self.scheduler.fail(plan, "planted"))
        self.scheduler.recover()

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan.num_prefill_tokens <= 5
        assert len({sequence.slot for sequence in plan.rows}) == len(plan.rows)
        in_flight = [
            sequence
            for flight in self.flights
            for row, sequence in enumerate(flight.plan.rows)
            if row not in flight.result.forced
        ]
        for sequence in plan.rows:
            assert not sequence.is_finished, "a row that is known to have ended"
            assert len(sequence.output) + in_flight.count(sequence) < sequence.request.max_tokens, "a wasted row"
        return plan

    def fly(self, flight: Flight) -> None:
        """Commit the step before, and this one as well when nothing overlaps it."""
        flights = [*self.flights, flight]
        self.flights = [flights.pop()] if self.overlaps and not flight.plan.is_solo else []
        for landed in flights:
            if landed is flight:
                self.force(flight)
            self.take(self.scheduler.commit(landed.plan, landed.result))
        if self.flights:
            self.force(flight)

    def force(self, flight: Flight) -> None:
        if isinstance(flight.result.forced, dict):
            self.take(self.scheduler.force(flight.plan, flight.result.forced))

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.has_work == bool(self.open)

    def take(self, events: list[Event]) -> None:
        for event in events:
            if not isinstance(event, TokenEvent):
                continue
            key = (event.request_id, event.sample)
            assert key in self.open, "an event of a sample that has ended"
            if event.token_id is not None:
                self.num_tokens[key] = self.num_tokens.get(key, 0) + 1
            if event.finish_reason is not None:
                self.open.remove(key)
            if event.finish_reason is FinishReason.LENGTH:
                assert self.num_tokens.get(key, 0) == self.limits[event.request_id]

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.step(token=1)
        assert self.open == set()
        assert self.scheduler.num_running == 0


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class OverlappedBooks(Books):
    """The same with one step planned before the last is committed."""

    overlaps = True


TestOverlappedBooks = OverlappedBooks.TestCase
TestOverlappedBooks.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
