"""Who runs next: first come first served, slots and budget respected, and nobody lost after a failure."""

from __future__ import annotations

import dataclasses

import pytest

from app.engine.request import FinishReason, GenerationRequest, Progress, PromptLogprobsEvent, TokenEvent
from app.engine.scheduler import Scheduler
from tests.engine.scheduling import STOP, ids, request, spans, step


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


def test_what_was_told_of_a_prompt_is_not_told_again_to_a_request_that_goes_on() -> None:
    scheduler = Scheduler(1, 2)
    scheduler.add(dataclasses.replace(request("a", length=6, logprobs=0), progress=Progress(((),), num_scored=3)))
    told = [event for _ in range(3) for event in step(scheduler)[1] if isinstance(event, PromptLogprobsEvent)]
    assert [(event.start, len(event.logprobs)) for event in told] == [(4, 1), (5, 1)]
