"""The engine: a synchronous object that turns requests into events, one step at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from app.engine.compiling import CompileQueue, GrammarCompiler
from app.engine.constraints import constraints_of
from app.engine.request import EngineStats, Event, GenerationRequest, Grammar, SamplingParams
from app.engine.scheduler import Scheduler
from app.engine.sequence import Forced, StepPlan, StepResult

logger = logging.getLogger(__name__)

# joint steps that may raise one after another, though every sequence passes alone, before all of them are given up
MAX_JOINT_FAILURES = 3

# moments without work, one after the other, before the tokenizer of grammars is read, which holds up a step meanwhile
IDLE_MOMENTS = 4


class RequestRefused(ValueError):
    """A request that can never run; the message says why."""


class StepRunner(Protocol):
    """What the engine asks of a runner; see ``runner.Runner``. A pending step is the runner's own affair."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether a step goes on after ``launch`` has returned, so that the next may be launched behind it."""

    def launch(self, plan: StepPlan) -> Any:
        """Start a step; at most one other may be pending. If it raises, all states are suspect."""

    def forced(self, pending: Any) -> Mapping[int, Forced]:
        """By row, tokens that are known before a step is done."""

    def collect(self, pending: Any) -> StepResult:
        """Wait for a step, in the order in which they were launched. If it raises, all states are suspect."""

    def forget(self) -> None:
        """Drop everything that is kept between steps, apart from the states in the cache."""

    def probe(self) -> None:
        """Raise what the device raises when it no longer works at all."""

    def prepare_more(self) -> bool:
        """Use an idle moment to get ready for steps to come; whether anything was left to do."""


class Engine:
    """Continuous batching over one runner.

    Over an asynchronous runner a step is launched before the results of the one before are read, so that the device
    never waits for the host. ``step`` then returns the events of the step before the one that it launches.

    ``before_step`` is called with every plan before it is executed, and what it raises counts as raised by the step:
    the seam through which tests inject faults. ``grammars`` is used in a thread of its own; without it, no request may
    have a grammar.
    """

    def __init__(
        self,
        runner: StepRunner,
        *,
        num_slots: int,
        vocab_size: int,
        prefill_budget: int,
        before_step: Callable[[StepPlan], None] | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(num_slots, prefill_budget)
        self._vocab_size = vocab_size
        self._before_step = before_step
        self._compiling = CompileQueue(grammars) if grammars is not None else None
        self._events: list[Event] = []
        self._in_flight: tuple[StepPlan, Any] | None = None
        self._num_joint_failures = 0
        self._num_idle_moments = 0
        self._idle_since = 0
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        self._last_step_rows = 0
        self._last_step_prefill_tokens = 0
        self._admissions: list[tuple[str, float]] = []

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do or deliver anything."""
        compiling = self._compiling
        return (
            bool(self._events)
            or self._in_flight is not None
            or self._scheduler.has_work
            or (compiling is not None and compiling.is_waiting and compiling.has_ready)
        )

    @property
    def is_compiling(self) -> bool:
        """Whether there may be work without a call, once a grammar is compiled."""
        return self._compiling is not None and self._compiling.is_waiting

    @property
    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            scheduler.num_running,
            scheduler.num_waiting + (self._compiling.num_samples if self._compiling is not None else 0),
            scheduler.num_running,
            scheduler.num_slots,
            self._num_steps,
            self._num_prefill_tokens,
            self._num_decode_tokens,
            self._last_step_rows,
            self._last_step_prefill_tokens,
        )

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request, behind its grammar if that must be compiled. Raises RequestRefused when it can never run."""
        self._check_token_ids(request)
        if self._compiling is not None and request.request_id in self._compiling:
            raise RequestRefused(f"request {request.request_id} is live already")
        try:
            if request.sampling.grammar is not None:
                self._compile(request, request.sampling.grammar)
            else:
                self._scheduler.add(request, constraints_of(request, self._vocab_size))
        except ValueError as error:
            raise RequestRefused(str(error)) from None

    def abort(self, request_id: str, sample: int | None = None) -> None:
        """End one sample or all of a request; the events come with the next step. Unknown ones are ignored."""
        if self._compiling is not None and request_id in self._compiling:
            self._events += self._compiling.abort(request_id, sample)
        else:
            self._events += self._scheduler.abort(request_id, sample)

    def step(self) -> list[Event]:
        """Prompt tokens of waiting sequences, then one token of every running one. Does not raise for bad requests."""
        if self._compiling is not None and self._compiling.is_waiting:
            self._take_compiled(self._compiling)
        events, self._events = self._events, []
        flights = [] if self._in_flight is None else [self._in_flight]
        self._in_flight = None
        plan = self._scheduler.plan()
        if plan.admitted:
            now = time.monotonic()
            self._admissions += [(request.request_id, now) for request in plan.admitted]
        plans = [earlier for earlier, _ in flights] + ([] if plan.is_empty else [plan])
        forced: Mapping[int, Forced] = {}
        try:
            if not plan.is_empty:
                flights.append((plan, self._launch(plan)))
                forced = self._runner.forced(flights[-1][1])
                # who is under suspicion must be found out alone
                if self._runner.is_asynchronous and not plan.is_solo:
                    self._in_flight = flights.pop()
            results = [(made, self._runner.collect(pending)) for made, pending in flights]
        except Exception as error:
            sizes = [(len(plan.rows), len(plan.chunks)) for plan in plans]
            logger.exception("a step failed; rows and chunks in flight: %s", sizes)
            self._in_flight = None
            return events + self._survive(plans, error)
        for made, result in results:
            self._count(made)
            if made is plan:
                events += self._scheduler.force(plan, forced)
            events += self._scheduler.commit(made, result)
        if self._in_flight is not None:
            events += self._scheduler.force(plan, forced)
        return events

    def take_admissions(self) -> list[tuple[str, float]]:
        """The requests that have got their slots since this was last asked, and when, as ``time.monotonic`` tells."""
        admissions, self._admissions = self._admissions, []
        return admissions

    def prepare_more(self) -> bool:
        """Use a moment without work to get ready for steps to come; whether anything was left to do."""
        if self._runner.prepare_more():
            return True
        if self._compiling is not None and not self._compiling.is_prepared:
            self._num_idle_moments = self._num_idle_moments + 1 if self._num_steps == self._idle_since else 0
            self._idle_since = self._num_steps
            if self._num_idle_moments >= IDLE_MOMENTS:
                self._compiling.prepare()
        return False

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not balance."""
        self._scheduler.check_integrity()

    def _compile(self, request: GenerationRequest, grammar: Grammar) -> None:
        if self._compiling is None:
            raise RequestRefused("structured output is not possible: this engine has no tokenizer")
        self._scheduler.check(request)
        self._compiling.add(request, grammar)

    def _take_compiled(self, compiling: CompileQueue) -> None:
        ready, ends = compiling.take()
        self._events += ends
        for compiled in ready:
            request = compiled.request
            self._scheduler.add(request, constraints_of(request, self._vocab_size, compiled.matcher))
            for sample in compiled.aborted:
                # its end has been told
                self._scheduler.abort(request.request_id, sample)

    def _launch(self, plan: StepPlan) -> Any:
        if self._before_step is not None:
            self._before_step(plan)
        return self._runner.launch(plan)

    def _survive(self, plans: list[StepPlan], error: Exception) -> list[Event]:
        """Fail what fails alone; otherwise have every sequence tried alone. Raises when the device is gone.

        The steps in flight are given up together: which of them broke a device cannot be told.
        """
        self._runner.probe()
        self._runner.forget()
        is_alone = len({sequence.request.request_id for plan in plans for sequence in plan.members}) == 1
        self._num_joint_failures += not is_alone
        events: list[Event] = []
        if is_alone or self._num_joint_failures > MAX_JOINT_FAILURES:
            self._num_joint_failures = 0
            message = f"the engine failed on this request ({type(error).__name__})"
            events = [event for plan in plans for event in self._scheduler.fail(plan, message)]
        self._scheduler.recover()
        return events

    def _count(self, plan: StepPlan) -> None:
        if not plan.is_solo:
            self._num_joint_failures = 0
        self._num_steps += 1
        self._num_prefill_tokens += plan.num_prefill_tokens
        self._num_decode_tokens += plan.num_decode_tokens
        self._last_step_rows = len(plan.rows)
        self._last_step_prefill_tokens = plan.num_prefill_tokens

    def _check_token_ids(self, request: GenerationRequest) -> None:
        # an index outside the vocabulary would take the whole device down
        ids = request.prompt_token_ids
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise RequestRefused(f"a prompt token is outside the vocabulary of {self._vocab_size}")
        if any(not 0 <= token < self._vocab_size for token, _ in request.sampling.logit_bias):
            raise RequestRefused(f"logit_bias names a token outside the vocabulary of {self._vocab_size}")
        self._check_rules(request.sampling)

    def _check_rules(self, sampling: SamplingParams) -> None:
        if (allowed := sampling.allowed_token_ids) is not None:
            if not allowed:
                raise RequestRefused("allowed_token_ids allows no token")
            if not 0 <= min(allowed) <= max(allowed) < self._vocab_size:
                raise RequestRefused(f"allowed_token_ids names a token outside the vocabulary of {self._vocab_size}")
        for word in sampling.bad_words:
            if not word:
                raise RequestRefused("one of the bad_words is empty")
            if not 0 <= min(word) <= max(word) < self._vocab_size:
                raise RequestRefused(f"bad_words names a token outside the vocabulary of {self._vocab_size}")
