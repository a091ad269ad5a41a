"""The requests that the process works on, whom to tell of their tokens, and how another process goes on with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from app.engine.client.journal import Journal
from app.engine.interface import EngineError, SampleSink
from app.engine.messages import Abort, RichToken, StepReport, Submit, unpack_rich
from app.engine.request import GenerationRequest, Progress, PromptLogprobsEvent


@dataclass(slots=True)
class _Request:
    request: GenerationRequest
    key: int
    sinks: Sequence[SampleSink]
    num_unfinished: int
    # what is told of it begins here in the journal
    since: int
    aborted: list[int] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def names(self) -> range:
        """What samples are called in reports."""
        return range(self.key, self.key + len(self.sinks))


class LiveRequests:
    """Hands out keys, and takes reports apart. A sample's sink is known by the number that names it in reports."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal or Journal()
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
        live = _Request(request, key, sinks, request.n, self._journal.end)
        self._by_id[live.request_id] = self._by_key[key] = live
        self._sinks.update(enumerate(sinks, key))
        return key

    def remove(self, request_id: str) -> None:
        """Tell nobody any more of what comes of a request."""
        live = self._by_id.pop(request_id)
        del self._by_key[live.key]
        for name in live.names:
            self._sinks.pop(name, None)
        # dictionaries keep their order, so this is the oldest
        oldest = next(iter(self._by_id.values()), None)
        self._journal.forget_before(self._journal.end if oldest is None else oldest.since)

    def note_abort(self, request_id: str, sample: int) -> None:
        """A sample is to end early, which another process would have to be told as well."""
        self._by_id[request_id].aborted.append(sample)

    def deliver(self, report: StepReport, message: bytes) -> None:
        """Tell each sink what the step brought it. ``message``: the report as it came."""
        if self._by_id:
            self._journal.write(message)
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

    def interrupt(self, error: EngineError) -> None:
        """The process is gone, and another will go on with its requests.

        Those are lost that were live when one died before, which may be their doing, and those that began before what
        the journal still has.
        """
        first = self._journal.first
        lost = [live for live in self._by_id.values() if live.request.progress is not None or live.since < first]
        sinks = [self._sinks[name] for live in lost for name in live.names if name in self._sinks]
        for live in lost:
            self.remove(live.request_id)
        outputs, num_scored = self._read_journal()
        self._journal.forget_before(self._journal.end)
        for live in self._by_id.values():
            told = tuple(tuple(outputs[name]) if name in outputs else None for name in live.names)
            live.request = replace(live.request, progress=Progress(told, num_scored.get(live.key, 0)))
            live.since = self._journal.end
        for sink in sinks:
            sink.on_lost(error)

    def resume(self) -> Iterator[Submit | Abort]:
        """What a new process has to be told of the requests that were interrupted; a ``Submit`` for each."""
        for live in self._by_id.values():
            yield Submit(live.key, live.request)
            for sample in live.aborted:
                yield Abort(live.request_id, sample)

    def _read_journal(self) -> tuple[dict[int, list[int]], dict[int, int]]:
        """The tokens of each sample that is live, by name, and how many prompt tokens were scored, by key."""
        outputs: dict[int, list[int]] = {name: [] for name in self._sinks}
        num_scored: dict[int, int] = {}
        for report in self._journal.read():
            for piece in report.prompt_slices:
                num_scored[piece.key] = piece.start + len(piece.logprobs) - 1
            for name, token_id in zip(report.samples, report.tokens, strict=True):
                if name in outputs:
                    outputs[name].append(token_id)
            for rich in report.rich:
                if rich.token_id is not None and rich.key + rich.sample in outputs:
                    outputs[rich.key + rich.sample].append(rich.token_id)
        return outputs, num_scored

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
