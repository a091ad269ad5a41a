"""Requests that wait for their grammar, which is compiled in a thread of its own while steps go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from app.engine.grammars import GrammarError
from app.engine.matchers import Matcher
from app.engine.request import Event, FinishReason, GenerationRequest, Grammar, TokenEvent

logger = logging.getLogger(__name__)

# what a grammar that was tried out in half of it may take
STACK_BYTES = 8 * 1024 * 1024

Result = TypeVar("Result")


class GrammarCompiler(Protocol):
    """What turns grammars into matchers; ``matchers.Compiler`` is one."""

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of its output. Raises GrammarError."""

    def load(self) -> object:
        """Read what every grammar needs. Raises GrammarError."""


@dataclass(slots=True)
class _Waiting:
    request: GenerationRequest
    matcher: Future[Matcher]
    aborted: set[int] = field(default_factory=set)

    def ends(self, reason: FinishReason, error: str | None = None) -> list[Event]:
        """Of the samples that have not ended."""
        left = (sample for sample in self.request.unfinished if sample not in self.aborted)
        name = self.request.request_id
        return [TokenEvent(name, sample, None, finish_reason=reason, error=error) for sample in left]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request whose grammar is ready, and those of its samples that have ended meanwhile."""

    request: GenerationRequest
    matcher: Matcher
    aborted: frozenset[int]


class CompileQueue:
    """One grammar after the other, in the order of their requests. Only the compiler is used in another thread."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._waiting: dict[str, _Waiting] = {}
        self.is_prepared = False

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._waiting

    @property
    def num_samples(self) -> int:
        """Samples that wait."""
        return sum(len(waiting.request.unfinished) - len(waiting.aborted) for waiting in self._waiting.values())

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def has_ready(self) -> bool:
        """Whether ``take`` would return anything."""
        return any(waiting.matcher.done() for waiting in self._waiting.values())

    def add(self, request: GenerationRequest, grammar: Grammar) -> None:
        """Have the grammar of a request compiled."""
        self._waiting[request.request_id] = _Waiting(request, self._submit(self._compiler.compile, grammar))
        self.is_prepared = True

    def prepare(self) -> None:
        """Read ahead what the first grammar needs."""
        if not self.is_prepared:
            # a failure is told to the first request
            self._submit(self._compiler.load)
            self.is_prepared = True

    def _submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        # of the thread that this may start, which elsewhere may get too little
        before = threading.stack_size(STACK_BYTES)
        try:
            return self._thread.submit(function, *arguments)
        finally:
            threading.stack_size(before)

    def abort(self, request_id: str, sample: int | None) -> list[Event]:
        """End one sample of a request that waits, or all. What does not wait is ignored."""
        waiting = self._waiting.get(request_id)
        if waiting is None or sample in waiting.aborted or sample not in (None, *waiting.request.unfinished):
            return []
        if sample is None or len(waiting.aborted) == len(waiting.request.unfinished) - 1:
            del self._waiting[request_id]
            waiting.matcher.cancel()
            return waiting.ends(FinishReason.ABORT)
        waiting.aborted.add(sample)
        return [TokenEvent(request_id, sample, None, finish_reason=FinishReason.ABORT)]

    def take(self) -> tuple[list[Compiled], list[Event]]:
        """The requests that need wait no longer, and the ends of those whose grammars cannot be used."""
        ready: list[Compiled] = []
        events: list[Event] = []
        for waiting in [waiting for waiting in self._waiting.values() if waiting.matcher.done()]:
            del self._waiting[waiting.request.request_id]
            try:
                ready.append(Compiled(waiting.request, waiting.matcher.result(), frozenset(waiting.aborted)))
            except GrammarError as error:
                events += waiting.ends(FinishReason.INVALID, str(error))
            except Exception as error:
                logger.exception("a grammar could not be compiled")
                events += waiting.ends(FinishReason.ERROR, f"the grammar cannot be used ({type(error).__name__})")
        return ready, events
