"""Requests for a scheduler that has no engine, and the answers that a runner would give it."""

from __future__ import annotations

from app.engine.request import Event, GenerationRequest, SamplingParams, TokenLogprobs
from app.engine.scheduler import Scheduler
from app.engine.sequence import StepPlan, StepResult

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
