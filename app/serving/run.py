"""One completion in the engine: submitted, followed, and its rows freed."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from app.engine.interface import EngineClient, EngineError
from app.serving.best import best_parts
from app.serving.choices import Choice
from app.serving.errors import RequestError, ServerFailure
from app.serving.failures import request_error
from app.serving.observer import CompletionObserver
from app.serving.outlet import Outlet
from app.serving.payloads import usage_object
from app.serving.prepared import PreparedCompletion
from app.serving.scores import make_scorer
from app.serving.tokenizer import Tokenizer
from app.serving.turns import Turns

logger = logging.getLogger(__name__)


class CompletionRun:
    """Hands the request to the engine at once, so it must be closed in any case. Lives on one event loop.

    With an ``outlet`` chunks go there as soon as they can; without one ``answer`` gives the whole in the end.

    Raises RequestError.
    """

    # hundreds of these are worked on in each step, so that what is read of them has to lie close together
    __slots__ = (
        "_changed",
        "_choices",
        "_done",
        "_encoder",
        "_engine",
        "_failure",
        "_is_ended",
        "_is_plain",
        "_last_batch_at",
        "_num_generated",
        "_num_unfinished",
        "_observer",
        "_outlet",
        "_prepared",
        "_tokenizer",
        "_touched",
        "_turns",
        "is_over",
    )

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        turns: Turns,
        prepared: PreparedCompletion,
        outlet: Outlet | None,
        observer: CompletionObserver | None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._turns = turns
        self._prepared = prepared
        self._outlet = outlet
        self._encoder = prepared.form.encoder(outlet.frame) if outlet is not None else None
        self._is_plain = self._encoder is not None and self._encoder.is_plain
        self._observer = observer
        self._num_generated = 0
        self._last_batch_at: float | None = None
        self._failure: RequestError | None = None
        # nothing more is wanted of the engine, but something may still wait for the outlet
        self.is_over = False
        self._is_ended = False
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # choices with something to take in, and those with something to write
        self._touched: list[Choice] = []
        self._changed: dict[Choice, None] = {}
        self._choices = [
            Choice(i * prepared.n + sample, prepared, prompt, tokenizer, self._on_arrival, scorer)
            for i, (prompt, scorer) in enumerate(
                (prompt, make_scorer(prepared, prompt, tokenizer)) for prompt in prepared.prompts
            )
            for sample in range(prepared.n)
        ]
        self._num_unfinished = len(self._choices)
        self._submit()

    @property
    def done(self) -> asyncio.Future[None]:
        """Done once it is over and everything was written."""
        return self._done

    @property
    def has_begun(self) -> bool:
        """Whether tokens of it have been taken in."""
        return self._last_batch_at is not None

    def check(self) -> None:
        """Raises what made the run fail."""
        if self._failure is not None:
            raise self._failure

    def answer(self) -> bytes:
        """The whole answer as JSON, once it is done."""
        prepared = self._prepared
        if prepared.num_best is None:
            parts = [choice.take() for choice in self._choices]
        else:
            parts = best_parts(self._choices, prepared.n, prepared.num_best)
        return prepared.form.answer(parts, self._usage())

    def flush(self, now: float) -> None:
        """Take in what has arrived and write it, if it can be written."""
        num_before = self._num_generated
        for choice in self._touched:
            if not self.is_over and not choice.is_over:
                self._take_in(choice)
        self._touched.clear()
        if self._num_generated > num_before:
            if self._last_batch_at is not None:
                self._turns.count_gap(self._last_batch_at)
            elif self._observer is not None:
                self._observer.on_first_token(now - self._prepared.started)
            self._last_batch_at = now
        self.resume()

    def resume(self) -> None:
        """Write what waits for the outlet, which is not blocked any more."""
        outlet = self._outlet
        if outlet is not None and self._changed and not outlet.is_blocked:
            chunks = b"".join([self._chunk(choice) for choice in self._changed])
            self._changed.clear()
            if self._num_unfinished == 0 and self._failure is None and self._encoder is not None:
                chunks += self._encoder.ending(self._usage())
            if chunks:
                outlet.write(chunks, is_last=self.is_over)
        if self.is_over:
            self._settle()

    def fail(self, error: Exception) -> None:
        """Something that must not happen did."""
        logger.error("completion failed", exc_info=error)
        self._failure = ServerFailure("the server failed on this request")
        self.is_over = True
        self._touched.clear()
        self._changed.clear()
        self._settle()

    def close(self) -> None:
        """Free the rows that are not free yet. Idempotent."""
        self._end("abort")
        self.is_over = True
        # each choice knows this run, and such rings stay in memory for long
        for choices in (self._choices, self._changed):
            choices.clear()
        for prompt in self._prepared.prompts:
            self._engine.abandon(prompt.request.request_id)

    def _submit(self) -> None:
        n = self._prepared.n
        try:
            for i, prompt in enumerate(self._prepared.prompts):
                self._engine.submit(prompt.request, self._choices[i * n : i * n + n])
        except EngineError as error:
            self._end("error")
            self.close()
            raise request_error(error) from error

    def _on_arrival(self, choice: Choice) -> None:
        if not self._touched:
            self._turns.add(self)
        self._touched.append(choice)

    def _take_in(self, choice: Choice) -> None:
        num_before = choice.num_tokens
        choice.take_in()
        self._num_generated += choice.num_tokens - num_before
        self._changed[choice] = None
        if choice.is_over:
            self._num_unfinished -= 1
            self._failure = choice.failure
            self.is_over = self._num_unfinished == 0 or self._failure is not None
            if choice.is_cut:
                self._abort(choice)

    def _abort(self, choice: Choice) -> None:
        number, sample = divmod(choice.index, self._prepared.n)
        with suppress(EngineError):
            self._engine.abort_sample(self._prepared.prompts[number].request.request_id, sample)

    def _chunk(self, choice: Choice) -> bytes:
        """What came of a choice since its last chunk; empty if that is nothing."""
        encoder = self._encoder
        assert encoder is not None
        if self._is_plain and not choice.is_over:
            text = choice.take_text()
            return encoder.chunk(choice.index, text) if text else b""
        part = choice.take()
        if part.is_empty:
            return b""
        return encoder.full_chunk(part, self._usage() if self._prepared.has_continuous_usage else None)

    def _usage(self) -> dict[str, Any]:
        return usage_object(self._prepared.num_prompt_tokens, self._num_generated)

    def _settle(self) -> None:
        if self._failure is not None:
            self._end("error")
        else:
            self._end("length" if any(choice.finish_reason == "length" for choice in self._choices) else "stop")
        if not self._done.done() and (self._outlet is None or not self._changed):
            self._done.set_result(None)

    def _end(self, reason: str) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        if self._observer is not None:
            seconds = time.monotonic() - self._prepared.started
            self._observer.on_finish(reason, self._prepared.num_prompt_tokens, self._num_generated, seconds)
