"""Concurrent streaming clients against a running server: one JSON line per concurrency.

Time to first token and the gaps between tokens are measured per stream, from the moment its request is written;
tokens are those that the server's usage counts. Clients run in processes of their own and speak HTTP by hand, so that
they are not what is measured. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_EVENT = b"\ndata: {"
_ERROR_EVENT = b'\ndata: {"error"'
_END = b"\r\n0\r\n\r\n"
_OVERLAP = max(len(_EVENT), len(_END), len(_ERROR_EVENT)) - 1
_USAGE_BYTES = 4096
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


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
    """Seconds on the machine's monotonic clock, so that those of several processes compare."""

    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_answers: int = 0
    errors: list[str] = field(default_factory=list)
    started: float = float("inf")
    ended: float = 0.0

    def add(self, other: Outcome) -> None:
        self.first_tokens += other.first_tokens
        self.gaps += other.gaps
        self.num_tokens += other.num_tokens
        self.num_answers += other.num_answers
        self.errors += other.errors
        self.started = min(self.started, other.started)
        self.ended = max(self.ended, other.ended)


class StreamClient(asyncio.Protocol):
    """One connection, one stream at a time. Events are counted, not parsed."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._arrivals: list[float] = []
        self._tail = b""
        self._head = b""
        self._has_error = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        # patterns never overlap what was searched before by as much as one of them
        seen = self._tail[-_OVERLAP:] + data
        self._arrivals += [now] * (seen.count(_EVENT) - self._tail[-_OVERLAP:].count(_EVENT))
        self._has_error = self._has_error or _ERROR_EVENT in seen
        self._tail = (self._tail + data)[-_USAGE_BYTES:]
        if len(self._head) < 12:
            self._head += data
        is_refused = len(self._head) >= 12 and not self._head.startswith(b"HTTP/1.1 200")
        if (is_refused or _END in seen) and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(str(error or "the server closed the connection")))

    async def run(self, request: bytes, outcome: Outcome) -> None:
        """Send one request and read its stream to the end. Raises ConnectionError."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._arrivals, self._tail, self._head, self._has_error = [], b"", b"", False
        started = time.perf_counter()
        self._transport.write(request)
        await self._done
        if self._has_error or not self._head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(self._describe())
        outcome.started = min(outcome.started, started)
        outcome.ended = max(outcome.ended, time.perf_counter())
        outcome.num_answers += 1
        outcome.num_tokens += self._num_tokens()
        # the last event carries usage and no token
        arrivals = self._arrivals[:-1]
        outcome.first_tokens += [arrived - started for arrived in arrivals[:1]]
        outcome.gaps += [later - earlier for earlier, later in zip(arrivals, arrivals[1:], strict=False)]

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _num_tokens(self) -> int:
        counts = _USAGE.findall(self._tail)
        if not counts:
            raise ConnectionError("the stream told no usage")
        return int(counts[-1])

    def _describe(self) -> str:
        return self._tail[-300:].decode("utf-8", "replace")


def request_bytes(load: Load, dice: random.Random) -> bytes:
    """One streamed completion of random token ids that runs to ``max_tokens``."""
    body = json.dumps(
        {
            "model": load.model,
            "prompt": [dice.randint(1, load.max_token_id) for _ in range(load.num_prompt_tokens)],
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


async def run_load(load: Load) -> Outcome:
    """Keep ``concurrency`` streams open until all requests are answered."""
    dice = random.Random(load.seed)
    requests = iter([request_bytes(load, dice) for _ in range(load.num_requests)])
    outcomes = [Outcome() for _ in range(load.concurrency)]
    await asyncio.gather(*(_keep_asking(load, requests, outcome) for outcome in outcomes))
    return _sum(outcomes)


async def _keep_asking(load: Load, requests: Iterator[bytes], outcome: Outcome) -> None:
    client: StreamClient | None = None
    for request in requests:
        try:
            if client is None:
                _, client = await asyncio.get_running_loop().create_connection(StreamClient, load.host, load.port)
            await client.run(request, outcome)
        except OSError as error:
            outcome.errors.append(str(error))
            if client is not None:
                client.close()
            client = None
    if client is not None:
        client.close()


def _sum(outcomes: Sequence[Outcome]) -> Outcome:
    total = Outcome()
    for outcome in outcomes:
        total.add(outcome)
    return total


def _worker(load: Load, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(asyncio.run(run_load(load)))


def measure(loads: Sequence[Load]) -> Outcome:
    """Run each load in a process of its own, all at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(loads)), context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(load, barrier, results), daemon=True) for load in loads]
    for worker in workers:
        worker.start()
    outcomes = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return _sum(outcomes)


def split(load: Load, num_processes: int) -> list[Load]:
    """The load in equal shares, with prompts of their own."""
    num_processes = min(num_processes, load.concurrency)
    shares = []
    for number in range(num_processes):
        concurrency = _share(load.concurrency, num_processes, number)
        num_requests = _share(load.num_requests, num_processes, number)
        fields = {**vars(load), "concurrency": concurrency, "num_requests": num_requests}
        shares.append(Load(**{**fields, "seed": load.seed * 1000 + number}))
    return shares


def _share(total: int, num_parts: int, number: int) -> int:
    return total // num_parts + (number < total % num_parts)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that ``share`` of all do not exceed, in milliseconds."""
    if not values:
        return None
    ordered = sorted(values)
    return round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def report(load: Load, num_processes: int, outcome: Outcome) -> dict[str, Any]:
    """One line of results."""
    seconds = outcome.ended - outcome.started if outcome.num_answers else 0.0
    return {
        "benchmark": "serve",
        "model": load.model,
        "concurrency": load.concurrency,
        "processes": num_processes,
        "num_requests": outcome.num_answers,
        "num_errors": len(outcome.errors),
        "first_error": outcome.errors[0] if outcome.errors else None,
        "prompt_tokens": load.num_prompt_tokens,
        "max_tokens": load.max_tokens,
        "ttft_ms": {
            "median": quantile(outcome.first_tokens, 0.5),
            "p99": quantile(outcome.first_tokens, 0.99),
            "worst": quantile(outcome.first_tokens, 1.0),
        },
        "inter_token_ms": {
            "p50": quantile(outcome.gaps, 0.5),
            "p99": quantile(outcome.gaps, 0.99),
            "worst": quantile(outcome.gaps, 1.0),
        },
        "num_tokens": outcome.num_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(outcome.num_tokens / seconds, 1) if seconds else None,
    }


def find_model(url: str, api_key: str | None) -> str:
    """The name of the served model."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {api_key or ''}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(json.load(response)["data"][0]["id"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load a running server with concurrent streams.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--concurrency", default="1,8,32", help="streams at a time, one line of results for each")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--num-requests", type=int, help="requests per line; 4 times the concurrency when not given")
    parser.add_argument("--processes", type=int, default=4, help="client processes, at most one per stream")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-token-id", type=int, default=250, help="prompts are random ids from 1 to this one")
    parser.add_argument("--warmup", type=int, default=1, help="requests per stream that are not measured")
    parser.add_argument("--api-key")
    parser.add_argument("--model", help="the served model when not given")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code is 1 when a request failed."""
    options = parse(arguments)
    address = urlsplit(options.url)
    model = options.model or find_model(options.url.rstrip("/"), options.api_key)
    has_errors = False
    for concurrency in map(int, options.concurrency.split(",")):
        load = Load(
            host=address.hostname or "127.0.0.1",
            port=address.port or 80,
            api_key=options.api_key,
            model=model,
            concurrency=concurrency,
            num_requests=options.num_requests or 4 * concurrency,
            num_prompt_tokens=options.prompt_tokens,
            max_tokens=options.max_tokens,
            max_token_id=options.max_token_id,
            temperature=options.temperature,
            seed=options.seed,
        )
        if options.warmup:
            warmup = {**vars(load), "num_requests": options.warmup * concurrency, "max_tokens": 8, "seed": -1}
            asyncio.run(run_load(Load(**warmup)))
        loads = split(load, options.processes)
        outcome = measure(loads)
        has_errors = has_errors or bool(outcome.errors)
        print(json.dumps(report(load, len(loads), outcome)), flush=True)
    return 1 if has_errors else 0


if __name__ == "__main__":
    sys.exit(main())
