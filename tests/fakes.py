"""An engine without a model: it plays scripts of token ids and keeps the contract of ``app.engine.interface``."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from app.engine.interface import EngineDied, EngineError, EngineStatus, EngineUnavailable, SampleSink
from app.engine.request import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PromptLogprobsEvent,
    TokenEvent,
    TokenLogprobs,
)

# the tokens of one sample; an end of the iterable counts as the model's end-of-text
Script = Callable[[GenerationRequest, int], Iterable[int]]


def make_info(vocab_size: int, eos_token_ids: tuple[int, ...] = (), **values: object) -> ModelInfo:
    """A model's description with plain values where none are given."""
    defaults: dict[str, object] = {
        "model_dir": "/nowhere",
        "architecture": "mamba",
        "num_parameters": 1000,
        "vocab_size": vocab_size,
        "num_layers": 2,
        "hidden_size": 16,
        "dtype": "float32",
        "state_dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 8,
        "state_bytes_per_seq": 4096,
        "bos_token_id": None,
        "eos_token_ids": eos_token_ids,
        "pad_token_id": None,
    }
    return ModelInfo(**{**defaults, **values})  # type: ignore[arg-type]


def repeat_prompt(request: GenerationRequest, sample: int) -> Iterator[int]:
    """Sample k says the prompt again and again, starting with its token k."""
    ids = request.prompt_token_ids
    return itertools.islice(itertools.cycle(ids), sample % len(ids), None)


def fake_logprobs(token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Numbers that a test can foretell: the token and its neighbours, less likely with every one."""
    top = [((token_id + i) % vocab_size, -0.5 * (i + 1)) for i in range(num_top)]
    return TokenLogprobs(-0.5, tuple(top))


@dataclass
class FakeEngine:
    """Plays ``script`` with ``burst`` tokens of each sample per batch and ``delay`` seconds between batches.

    The tokens of a batch come without a turn of the event loop between them, as those of reports that waited do.

    requests: all that were submitted. live: ids of those that hold rows. aborted: (request id, sample) ended early.
    fail_at: after so many batches of a request ``failure`` happens: "error", "invalid", "abort" (events)
    or "died".
    """

    info: ModelInfo
    script: Script = repeat_prompt
    burst: int = 1
    delay: float = 0.0
    fail_at: int | None = None
    failure: str = "error"
    status: EngineStatus = EngineStatus.READY
    num_restarts: int = 0
    num_resumed: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[tuple[str, int]] = field(default_factory=list)
    live: dict[str, FakeStream] = field(default_factory=dict)

    @property
    def stats(self) -> EngineStats:
        running = sum(stream.request.n for stream in self.live.values())
        return EngineStats(num_running=running, num_slots_used=running, num_slots=self.info.max_num_seqs)

    def heartbeat_age(self) -> float:
        return 0.0

    def watch_queue(self, observer: Callable[[float], None]) -> None:
        self.on_wait = observer

    def submit(self, request: GenerationRequest, sinks: Sequence[SampleSink]) -> None:
        if self.status is not EngineStatus.READY:
            raise EngineUnavailable(self.status)
        assert request.request_id not in self.live, "the same id twice at once"
        assert len(sinks) == request.n
        self.requests.append(request)
        self.live[request.request_id] = FakeStream(self, request, sinks)

    def abort_sample(self, request_id: str, sample: int) -> None:
        if request_id in self.live:
            self.live[request_id].abort(sample)

    def abandon(self, request_id: str) -> None:
        stream = self.live.pop(request_id, None)
        if stream is not None:
            self.aborted += [(request_id, sample) for sample in stream.close()]

    def die(self) -> None:
        """The engine process goes away: every live request learns of it."""
        self.status = EngineStatus.RESTARTING
        for stream in list(self.live.values()):
            stream.lose()


class FakeStream:
    """The events of one request, told to its sinks by a task."""

    def __init__(self, engine: FakeEngine, request: GenerationRequest, sinks: Sequence[SampleSink]) -> None:
        self.request = request
        self._engine = engine
        self._sinks = sinks
        self._tokens = {sample: iter(engine.script(request, sample)) for sample in range(request.n)}
        self._num_sent = dict.fromkeys(self._tokens, 0)
        self._aborted: set[int] = set()
        self._task = asyncio.get_running_loop().create_task(self._play())

    def close(self) -> list[int]:
        """Tell nothing any more; the samples that had not ended."""
        self._task.cancel()
        return list(self._tokens)

    def lose(self, error: EngineError | None = None) -> None:
        self._engine.live.pop(self.request.request_id, None)
        for sample in self.close():
            self._sinks[sample].on_lost(error or EngineDied())

    def abort(self, sample: int) -> None:
        if sample in self._tokens and sample not in self._aborted:
            self._aborted.add(sample)
            self._engine.aborted.append((self.request.request_id, sample))

    async def _play(self) -> None:
        for number in itertools.count():
            await asyncio.sleep(self._engine.delay)
            if number == 0:
                self._tell_prompt_logprobs()
            if number == self._engine.fail_at:
                self._fail()
            else:
                for _ in range(self._engine.burst):
                    self._step()
            if not self._tokens:
                self._engine.live.pop(self.request.request_id, None)
                return

    def _fail(self) -> None:
        if self._engine.failure == "died":
            self.lose()
            return
        reason = FinishReason(self._engine.failure)
        sample = min(self._tokens)
        self._tokens.clear()
        event = TokenEvent(
            self.request.request_id,
            sample,
            None,
            finish_reason=reason,
            error=None if reason is FinishReason.ABORT else "the logits were not finite",
        )
        self._sinks[sample].on_event(event)

    def _step(self) -> None:
        """One more token of every sample that is not at its end."""
        for sample in list(self._tokens):
            event = self._next_event(sample)
            if event.finish_reason is not None:
                del self._tokens[sample]
            if event == TokenEvent(event.request_id, sample, event.token_id) and event.token_id is not None:
                self._sinks[sample].on_token(event.token_id)
            else:
                self._sinks[sample].on_event(event)

    def _next_event(self, sample: int) -> TokenEvent:
        request = self.request
        if sample in self._aborted:
            return TokenEvent(request.request_id, sample, None, finish_reason=FinishReason.ABORT)
        if request.max_tokens == 0:
            return TokenEvent(request.request_id, sample, None, finish_reason=FinishReason.LENGTH)
        token = next(self._tokens[sample], None)
        if token is None:
            token = self._engine.info.eos_token_ids[0]
        self._num_sent[sample] += 1
        reason = stop = None
        if token in request.stop_token_ids:
            reason, stop = FinishReason.STOP, token
        elif self._num_sent[sample] == request.max_tokens:
            reason = FinishReason.LENGTH
        num_top = request.sampling.logprobs
        logprobs = None if num_top is None else fake_logprobs(token, num_top, self._engine.info.vocab_size)
        return TokenEvent(request.request_id, sample, token, logprobs, reason, stop)

    def _tell_prompt_logprobs(self) -> None:
        """Slices of three, as an engine with a small budget would send them."""
        request, num_top = self.request, self.request.prompt_logprobs
        if num_top is None:
            return
        ids = request.prompt_token_ids
        for start in range(1, len(ids), 3):
            entries = [fake_logprobs(token, num_top, self._engine.info.vocab_size) for token in ids[start : start + 3]]
            for sink in self._sinks:
                sink.on_event(PromptLogprobsEvent(request.request_id, start, tuple(entries)))
