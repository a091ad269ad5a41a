"""Completions from body to answer, whole or streamed."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import orjson

from app import __version__
from app.engine.interface import EngineClient, EngineDied, EngineError, EngineUnavailable, RequestStream
from app.engine.request import FinishReason, ModelInfo, PromptLogprobsEvent, TokenEvent
from app.schemas.completions import CompletionRequest
from app.serving.choices import Choice
from app.serving.errors import ModelNotFound, RequestError, ServerFailure, Unavailable
from app.serving.limits import ServingLimits
from app.serving.logprobs import logprobs_object
from app.serving.merging import Batch, merge
from app.serving.observer import CompletionObserver
from app.serving.payloads import ChunkEncoder, head_object, usage_object
from app.serving.prepared import PreparedCompletion
from app.serving.tokenizer import Tokenizer
from app.serving.translate import Translator

__all__ = ["CompletionService", "CompletionStream"]


class CompletionService:
    """Completions of one served model.

    engine: what generates. model_names: the names that requests may use, the first for requests that use none.
    observer: told of tokens and ends, for metrics.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        model_names: Sequence[str],
        limits: ServingLimits | None = None,
        observer: CompletionObserver | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_names = tuple(model_names)
        self._translator = Translator(tokenizer, limits or ServingLimits())
        self._observer = observer
        self._closer = _Closer()

    def prepare(self, body: CompletionRequest, request_id: str) -> PreparedCompletion:
        """Check and tokenize. Blocks in proportion to the prompts, asks nothing of the engine, may run in a thread.

        Raises RequestError: InvalidRequest, ModelNotFound, Unavailable while no model is loaded.
        """
        model = body.model or self._model_names[0]
        if model not in self._model_names:
            raise ModelNotFound(model)
        try:
            info = self._engine.info
        except EngineError as error:
            raise _request_error(error) from error
        return self._translator.translate(
            body, info, model=model, fingerprint=_fingerprint(info), request_id=request_id
        )

    async def complete(self, prepared: PreparedCompletion) -> bytes:
        """The whole answer as JSON. Cancelling frees the engine's rows. Raises RequestError."""
        run = self._start(prepared)
        try:
            async with aclosing(run.progress()) as batches:
                async for _ in batches:
                    pass
        finally:
            await run.aclose()
        choices = [run.choice_object(choice) for choice in run.choices]
        return orjson.dumps({**head_object(prepared), "choices": choices, "usage": run.usage()})

    def stream(self, prepared: PreparedCompletion) -> CompletionStream:
        """The answer in pieces. Hands the request to the engine at once, so the stream must be closed in any case.

        Raises RequestError, also while it is iterated.
        """
        return CompletionStream(self._start(prepared), prepared)

    def _start(self, prepared: PreparedCompletion) -> _Run:
        return _Run(self._engine, self._tokenizer, prepared, self._observer, self._closer)


class CompletionStream:
    """The JSON payloads of a streamed completion, in batches that can be written together."""

    def __init__(self, run: _Run, prepared: PreparedCompletion) -> None:
        self._run = run
        self._prepared = prepared
        self._encoder = ChunkEncoder(prepared)
        self._payloads = self._generate()

    def __aiter__(self) -> CompletionStream:
        return self

    async def __anext__(self) -> list[bytes]:
        return await anext(self._payloads)

    async def aclose(self) -> None:
        """Free the engine's rows, if they are not free yet. Idempotent."""
        await self._payloads.aclose()
        await self._run.aclose()

    async def _generate(self) -> AsyncGenerator[list[bytes], None]:
        run = self._run
        try:
            async with aclosing(run.progress()) as batches:
                async for touched in batches:
                    payloads = [payload for choice in touched if (payload := self._chunk(choice))]
                    if payloads:
                        yield payloads
        finally:
            await run.aclose()
        if self._prepared.has_usage_chunk:
            yield [self._encoder.usage_chunk(run.usage())]

    def _chunk(self, choice: Choice) -> bytes | None:
        usage = self._run.usage() if self._prepared.has_continuous_usage else None
        if self._prepared.logprobs is not None or choice.finish_reason is not None:
            content = self._run.choice_object(choice)
            is_empty = not content["text"] and not content["logprobs"] and choice.finish_reason is None
            return None if is_empty else self._encoder.full_chunk(content, usage)
        text, _, _ = choice.take()
        return self._encoder.chunk(choice.index, text, usage) if text else None


class _Run:
    """One completion in the engine: submits it, follows its events, frees its rows."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prepared: PreparedCompletion,
        observer: CompletionObserver | None,
        closer: _Closer,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prepared = prepared
        self._observer = observer
        self._closer = closer
        self._num_prompt_tokens = prepared.num_prompt_tokens
        self._num_generated = 0
        self._last_batch_at: float | None = None
        self._failure: RequestError | None = None
        self._is_over = False
        self._streams: list[RequestStream] = []
        self.choices = [
            Choice(i * prepared.n + sample, prepared, prompt, tokenizer)
            for i, prompt in enumerate(prepared.prompts)
            for sample in range(prepared.n)
        ]
        self._num_unfinished = len(self.choices)
        self._submit()

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        return usage_object(self._num_prompt_tokens, self._num_generated)

    def choice_object(self, choice: Choice) -> dict[str, Any]:
        """What came of a choice since it was asked for last."""
        text, entries, end = choice.take()
        has_logprobs = self._prepared.logprobs is not None and (entries or not self._prepared.is_stream)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs_object(entries, self._tokenizer, end) if has_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    async def progress(self) -> AsyncGenerator[list[Choice], None]:
        """After each batch of events the choices that it changed. Raises RequestError."""
        try:
            async with aclosing(merge(self._streams)) as batches:
                async for batch in batches:
                    touched = self._take_in(batch)
                    if touched:
                        yield touched
                    if self._failure is not None or not self._num_unfinished:
                        break
        except EngineError as error:
            self._failure = _request_error(error)
        if self._failure is None and self._num_unfinished:
            self._failure = ServerFailure("the engine ended this request too early")
        self._end("error" if self._failure is not None else self._reason())
        if self._failure is not None:
            raise self._failure

    async def aclose(self) -> None:
        """Free the rows, also when the task that awaits this is being cancelled over and over. Idempotent."""
        self._end("abort")
        streams, self._streams = self._streams, []
        if streams:
            await asyncio.shield(self._closer.close(streams))

    def _submit(self) -> None:
        try:
            for prompt in self._prepared.prompts:
                self._streams.append(self._engine.submit(prompt.request))
        except EngineError as error:
            self._end("error")
            self._closer.close(self._streams)
            raise _request_error(error) from error

    def _take_in(self, batch: Batch) -> list[Choice]:
        num_before = self._num_generated
        touched: dict[Choice, None] = {}
        for number, events in batch:
            for event in events:
                if isinstance(event, TokenEvent):
                    choice = self.choices[number * self._prepared.n + event.sample]
                    if self._take_token(choice, event):
                        touched[choice] = None
                else:
                    self._take_prompt_logprobs(number, event)
        self._observe(self._num_generated - num_before)
        return list(touched)

    def _take_token(self, choice: Choice, event: TokenEvent) -> bool:
        """Whether the event changed the choice; what comes after its end does not."""
        if choice.finish_reason is not None or self._failure is not None:
            return False
        if event.error is not None or event.finish_reason is FinishReason.ERROR:
            self._failure = ServerFailure(event.error or "the model failed on this request")
            return False
        if event.finish_reason is FinishReason.ABORT:
            self._failure = Unavailable("the server stopped this request before its end")
            return False
        self._num_generated += event.token_id is not None
        if choice.add_token(event):
            with suppress(EngineError):
                self._engine.abort_sample(event.request_id, event.sample)
        self._num_unfinished -= choice.finish_reason is not None
        return True

    def _take_prompt_logprobs(self, number: int, event: PromptLogprobsEvent) -> None:
        n = self._prepared.n
        for choice in self.choices[number * n : number * n + n]:
            choice.add_prompt_logprobs(event)

    def _observe(self, num_tokens: int) -> None:
        if self._observer is None or not num_tokens:
            return
        now = time.monotonic()
        if self._last_batch_at is None:
            self._observer.on_first_token(now - self._prepared.started)
        else:
            self._observer.on_tokens(num_tokens, now - self._last_batch_at)
        self._last_batch_at = now

    def _reason(self) -> str:
        return "length" if any(choice.finish_reason == "length" for choice in self.choices) else "stop"

    def _end(self, reason: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._observer is not None:
            seconds = time.monotonic() - self._prepared.started
            self._observer.on_finish(reason, self._num_prompt_tokens, self._num_generated, seconds)


class _Closer:
    """Closes streams in tasks of its own, which the end of the request's task does not touch."""

    def __init__(self) -> None:
        # the event loop itself holds tasks weakly
        self._tasks: set[asyncio.Task[None]] = set()

    def close(self, streams: Sequence[RequestStream]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(_close_all(streams))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _close_all(streams: Sequence[RequestStream]) -> None:
    for stream in streams:
        with suppress(EngineError):
            await stream.aclose()


def _request_error(error: EngineError) -> RequestError:
    if isinstance(error, EngineUnavailable):
        return Unavailable("the model is not ready to take requests")
    if isinstance(error, EngineDied):
        return Unavailable("the engine was lost while it worked on this request; it is started again")
    return ServerFailure("the engine failed on this request")


def _fingerprint(info: ModelInfo) -> str:
    """Changes when the same seed may give other tokens: with the model, its arithmetic or this server."""
    parts = (__version__, info.architecture, info.num_parameters, info.dtype, info.state_dtype, info.device)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
