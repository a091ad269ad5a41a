"""One step is planned before the last is committed: what ends in between costs nothing and leaves nothing."""

from __future__ import annotations

from app.engine.request import FinishReason
from app.engine.scheduler import Scheduler
from tests.engine.scheduling import STOP, carry_out, ids, request, spans, step


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
