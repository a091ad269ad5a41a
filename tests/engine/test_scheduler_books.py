"""Books that balance after anything, with one step in flight or two."""

from __future__ import annotations

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from app.engine.request import Event, FinishReason, TokenEvent
from app.engine.scheduler import Scheduler
from app.engine.sequence import Forced, RowEnd, StepPlan, StepResult
from tests.engine.scheduling import STOP, carry_out, request


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
