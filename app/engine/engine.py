"""The engine: a synchronous object that turns requests into events, one step at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.engine.request import EngineStats, Event, GenerationRequest
from app.engine.runner import Runner
from app.engine.scheduler import Scheduler
from app.engine.sequence import StepPlan

logger = logging.getLogger(__name__)

# joint steps that may raise one after another, though every sequence passes alone, before all of them are given up
MAX_JOINT_FAILURES = 3


class RequestRefused(ValueError):
    """A request that can never run; the message says why."""


class Engine:
    """Continuous batching over one runner.

    ``before_step`` is called with every plan before it is executed, and what it raises counts as raised by the step:
    the seam through which tests inject faults.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_slots: int,
        vocab_size: int,
        prefill_budget: int,
        before_step: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(num_slots, prefill_budget)
        self._vocab_size = vocab_size
        self._before_step = before_step
        self._events: list[Event] = []
        self._num_joint_failures = 0
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        self._last_step_rows = 0
        self._last_step_prefill_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do or deliver anything."""
        return bool(self._events) or self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.num_running,
            scheduler.num_slots,
            self._num_steps,
            self._num_prefill_tokens,
            self._num_decode_tokens,
            self._last_step_rows,
            self._last_step_prefill_tokens,
        )

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestRefused when it can never run."""
        self._check_token_ids(request)
        try:
            self._scheduler.add(request)
        except ValueError as error:
            raise RequestRefused(str(error)) from None

    def abort(self, request_id: str, sample: int | None = None) -> None:
        """End one sample or all of a request; the events come with the next step. Unknown ones are ignored."""
        self._events += self._scheduler.abort(request_id, sample)

    def step(self) -> list[Event]:
        """Prompt tokens of waiting sequences, then one token of every running one. Does not raise for bad requests."""
        events, self._events = self._events, []
        if not self._scheduler.has_work:
            return events
        plan = self._scheduler.plan()
        try:
            if self._before_step is not None:
                self._before_step(plan)
            result = self._runner.execute(plan)
        except Exception as error:
            logger.exception("a step with %d rows and %d chunks failed", len(plan.rows), len(plan.chunks))
            return events + self._survive(plan, error)
        self._count(plan)
        return events + self._scheduler.commit(plan, result)

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not balance."""
        self._scheduler.check_integrity()

    def _survive(self, plan: StepPlan, error: Exception) -> list[Event]:
        """Fail what fails alone; otherwise have every sequence tried alone. Raises when the device is gone."""
        self._runner.probe()
        self._runner.forget()
        is_alone = len({sequence.request.request_id for sequence in plan.members}) == 1
        self._num_joint_failures += not is_alone
        events: list[Event] = []
        if is_alone or self._num_joint_failures > MAX_JOINT_FAILURES:
            self._num_joint_failures = 0
            events = self._scheduler.fail(plan, f"the engine failed on this request ({type(error).__name__})")
        self._scheduler.recover()
        return events

    def _count(self, plan: StepPlan) -> None:
        if not plan.is_solo:
            self._num_joint_failures = 0
        self._num_steps += 1
        self._num_prefill_tokens += plan.num_prefill_tokens
        self._num_decode_tokens += len(plan.rows)
        self._last_step_rows = len(plan.rows)
        self._last_step_prefill_tokens = plan.num_prefill_tokens

    def _check_token_ids(self, request: GenerationRequest) -> None:
        # an index outside the vocabulary would take the whole device down
        ids = request.prompt_token_ids
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise RequestRefused(f"a prompt token is outside the vocabulary of {self._vocab_size}")
        if any(not 0 <= token < self._vocab_size for token, _ in request.sampling.logit_bias):
            raise RequestRefused(f"logit_bias names a token outside the vocabulary of {self._vocab_size}")
