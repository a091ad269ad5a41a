"""Tokens that are certain are told at once, and the next step has those that a state lacks."""

from __future__ import annotations

import dataclasses

import pytest

from app.engine.request import FinishReason, TokenEvent
from app.engine.scheduler import Scheduler
from app.engine.sequence import Forced, RowEnd, StepPlan
from tests.engine.scheduling import STOP, carry_out, ids, request, step


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
