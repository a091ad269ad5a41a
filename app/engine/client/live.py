"""The requests that the process works on, and whom to tell of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.interface import EngineError, SampleSink
from app.engine.messages import RichToken, StepReport, unpack_rich
from app.engine.request import GenerationRequest, PromptLogprobsEvent


@dataclass(slots=True)
class _Request:
    request_id: str
    key: int
    sinks: Sequence[SampleSink]
    num_unfinished: int


class LiveRequests:
    """Hands out keys, and takes reports apart. A sample's sink is known by the number that names it in reports."""

    def __init__(self) -> None:
        self._by_id: dict[str, _Request] = {}
        self._by_key: dict[int, _Request] = {}
        self._sinks: dict[int, SampleSink] = {}
        self._next_key = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def add(self, request: GenerationRequest, sinks: Sequence[SampleSink]) -> int:
        """The request's key. Raises ValueError for an id that is live, and for a wrong number of sinks."""
        if request.request_id in self._by_id:
            raise ValueError(f"request {request.request_id} is live already")
        if len(sinks) != request.n:
            raise ValueError(f"{len(sinks)} sinks for {request.n} samples")
        key = self._next_key
        self._next_key += request.n
        live = _Request(request.request_id, key, sinks, request.n)
        self._by_id[live.request_id] = self._by_key[key] = live
        self._sinks.update(enumerate(sinks, key))
        return key

    def remove(self, request_id: str) -> None:
        """Tell nobody any more of what comes of a request."""
        live = self._by_id.pop(request_id)
        del self._by_key[live.key]
        for name in range(live.key, live.key + len(live.sinks)):
            self._sinks.pop(name, None)

    def deliver(self, report: StepReport) -> None:
        """Tell each sink what the step brought it."""
        for piece in report.prompt_slices:
            if live := self._by_key.get(piece.key):
                event = PromptLogprobsEvent(live.request_id, piece.start, piece.logprobs)
                for sink in live.sinks:
                    sink.on_event(event)
        find = self._sinks.get
        for name, token_id in zip(report.samples, report.tokens, strict=True):
            if (listener := find(name)) is not None:
                listener.on_token(token_id)
        # a sample that has both has its end here
        for rich in report.rich:
            if live := self._by_key.get(rich.key):
                self._deliver_rich(live, rich)

    def lose_all(self, error: EngineError) -> None:
        """The process is gone with all of them."""
        sinks = list(self._sinks.values())
        for books in (self._by_id, self._by_key, self._sinks):
            books.clear()
        for sink in sinks:
            sink.on_lost(error)

    def _deliver_rich(self, live: _Request, rich: RichToken) -> None:
        name = live.key + rich.sample
        sink = self._sinks.get(name)
        if sink is None:
            return
        # before the sink is told, which may abandon the request
        if rich.finish_reason is not None:
            del self._sinks[name]
            live.num_unfinished -= 1
            if not live.num_unfinished:
                self.remove(live.request_id)
        sink.on_event(unpack_rich(live.request_id, rich))
