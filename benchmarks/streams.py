"""Streaming completions over sockets, spoken by hand so that the client is not what is measured.

Events are counted, not parsed: a read costs the client a few microseconds whatever it brings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import resource
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

# JSON escapes line breaks, so that no text of a token contains this
_EVENT = b"\ndata: "
_ERROR_EVENT = b'\ndata: {"error"'
_OVERLAP = len(_EVENT) - 1
_END = b"\r\n0\r\n\r\n"
_STATUS_BYTES = 12
_OK = b"HTTP/1.1 200"
_TAIL_BYTES = 1024
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
# one with the usage, one that says [DONE]
_EVENTS_WITHOUT_TOKENS = 2
_OTHER_FILES = 64
# below are the special tokens of most tokenizers, which a model may repeat and which have no text
_LEAST_TOKEN_ID = 16
_LEAST_EVENTS = 8


@dataclass(frozen=True)
class Load:
    """What one process sends: ``num_requests`` in all, ``concurrency`` at a time."""

    host: str
    port: int
    api_key: str | None
    model: str
    concurrency: int
    num_requests: int
    num_prompt_tokens: int
    max_tokens: int
    max_token_id: int
    temperature: float
    seed: int


@dataclass
class Outcome:
    """Seconds on the machine's monotonic clock, so that those of several processes compare.

    gaps[i] ends at gap_ends[i]. All streams run from ``steady_from``, when the last of the first requests got its
    first token, to ``steady_until``, when the first connection had nothing more to ask.
    """

    first_tokens: list[float] = field(default_factory=list)
    first_arrivals: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))
    gap_ends: array[float] = field(default_factory=lambda: array("d"))
    num_tokens: int = 0
    num_answers: int = 0
    errors: list[str] = field(default_factory=list)
    started: float = float("inf")
    ended: float = 0.0
    steady_from: float = 0.0
    steady_until: float = float("inf")

    def add(self, other: Outcome) -> None:
        self.first_tokens += other.first_tokens
        self.first_arrivals += other.first_arrivals
        self.gaps += other.gaps
        self.gap_ends += other.gap_ends
        self.num_tokens += other.num_tokens
        self.num_answers += other.num_answers
        self.errors += other.errors
        self.started = min(self.started, other.started)
        self.ended = max(self.ended, other.ended)
        if other.num_answers:
            self.steady_from = max(self.steady_from, other.steady_from)
            self.steady_until = min(self.steady_until, other.steady_until)

    def add_stream(self, started: float, arrivals: list[float], num_tokens: int) -> None:
        """One answer: when it was asked for, when each of its events arrived, and its tokens."""
        if self.num_answers == 0 and arrivals:
            self.steady_from = arrivals[0]
        if arrivals:
            self.first_tokens.append(arrivals[0] - started)
            self.first_arrivals.append(arrivals[0])
            self.steady_until = arrivals[-1]
        self.gaps.extend([later - earlier for earlier, later in zip(arrivals, arrivals[1:], strict=False)])
        self.gap_ends.extend(arrivals[1:])
        self.num_tokens += num_tokens
        self.num_answers += 1
        self.started = min(self.started, started)
        self.ended = max(self.ended, time.perf_counter())

    def steady_tokens_per_s(self) -> float | None:
        """Tokens per second between the first and the last quarter of all events; None for less than eight of them."""
        times = sorted((*self.first_arrivals, *self.gap_ends))
        begin, end = len(times) // 4, 3 * len(times) // 4
        if len(times) < _LEAST_EVENTS or times[end] == times[begin]:
            return None
        # an event may carry several tokens
        return (end - begin) * (self.num_tokens / len(times)) / (times[end] - times[begin])


class StreamClient(asyncio.Protocol):
    """One connection, one stream at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._arrivals: list[float] = []
        self._head = b""
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a transport of another event loop's is no subclass of asyncio's
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        # an event may begin in one read and end in the next
        num_events = data.count(_EVENT) + (self._tail[-_OVERLAP:] + data[:_OVERLAP]).count(_EVENT)
        if num_events == 1:
            self._arrivals.append(now)
        elif num_events:
            self._arrivals += [now] * num_events
        self._tail = data if len(data) >= _TAIL_BYTES else (self._tail + data)[-_TAIL_BYTES:]
        if len(self._head) < _STATUS_BYTES:
            self._head += data[:_STATUS_BYTES]
        if self._tail.endswith(_END) or not self._head.startswith(_OK[: len(self._head)]):
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(str(error or "the server closed the connection")))

    async def run(self, request: bytes, outcome: Outcome) -> None:
        """Send one request and read its stream to the end. Raises ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the server closed the connection")
        self._done = asyncio.get_running_loop().create_future()
        self._arrivals, self._head, self._tail = [], b"", b""
        started = time.perf_counter()
        self._transport.write(request)
        await self._done
        if _ERROR_EVENT in self._tail or not self._head.startswith(_OK):
            raise ConnectionError(self._tail[-300:].decode("utf-8", "replace"))
        outcome.add_stream(started, self._arrivals[:-_EVENTS_WITHOUT_TOKENS], self._num_tokens())

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _num_tokens(self) -> int:
        counts = _USAGE.findall(self._tail)
        if not counts:
            raise ConnectionError("the stream told no usage")
        return int(counts[-1])


def request_bytes(load: Load, dice: random.Random) -> bytes:
    """One streamed completion of random token ids that runs to ``max_tokens``."""
    body = json.dumps(
        {
            "model": load.model,
            "prompt": [dice.randint(_LEAST_TOKEN_ID, load.max_token_id) for _ in range(load.num_prompt_tokens)],
            "max_tokens": load.max_tokens,
            "temperature": load.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    key = f"Authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {load.host}:{load.port}\r\nContent-Type: application/json\r\n"
        f"{key}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def run_load(load: Load, wait_for_others: Callable[[], object] = lambda: None) -> Outcome:
    """Keep ``concurrency`` streams open until all requests are answered.

    ``wait_for_others`` is called once, after all requests are made and all connections open: nothing else then stands
    between the start and the first byte.
    """
    dice = random.Random(load.seed)
    requests = iter([request_bytes(load, dice) for _ in range(load.num_requests)])
    num_streams = min(load.concurrency, load.num_requests)
    clients = await asyncio.gather(*(_connect_if_possible(load) for _ in range(num_streams)))
    wait_for_others()
    outcomes = [Outcome() for _ in clients]
    pairs = zip(clients, outcomes, strict=True)
    await asyncio.gather(*(_keep_asking(load, client, requests, outcome) for client, outcome in pairs))
    return total(outcomes)


async def _keep_asking(load: Load, client: StreamClient | None, requests: Iterator[bytes], outcome: Outcome) -> None:
    for request in requests:
        try:
            if client is None:
                client = await _connect(load)
            await client.run(request, outcome)
        except OSError as error:
            outcome.errors.append(str(error))
            if client is not None:
                client.close()
            client = None
    if client is not None:
        client.close()


async def _connect(load: Load) -> StreamClient:
    _, client = await asyncio.get_running_loop().create_connection(StreamClient, load.host, load.port)
    return client


async def _connect_if_possible(load: Load) -> StreamClient | None:
    # what is wrong is told when the first request fails
    with contextlib.suppress(OSError):
        return await _connect(load)
    return None


def total(outcomes: Sequence[Outcome]) -> Outcome:
    """What all of them saw."""
    everything = Outcome()
    for outcome in outcomes:
        everything.add(outcome)
    return everything


def allow_open_files(num_connections: int) -> None:
    """Raise the limit of this process as far as the system lets it. Raises OSError where that is not enough."""
    wanted = num_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise OSError(f"{num_connections} connections need {wanted} open files, the system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """``asyncio.run``, on uvloop where it is installed: a read costs less there."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
