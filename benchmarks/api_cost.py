"""CPU time of the API process: microseconds per streamed token, and per request. Prints one line of JSON.

The engine is a metronome (``benchmarks.metronome``), so that nothing but HTTP and text is measured; what counts is the
processor time of the process (user and system), not the throughput, so that a busy machine disturbs little. Linux.

    python -m benchmarks.api_cost --tokenizer models/mamba-python-15m
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from app.engine.client import ProcessEngineClient
from app.engine.config import EngineConfig
from app.main import run as serve
from app.serving.tokenizer import Tokenizer
from app.settings import Settings
from benchmarks.serve import quantile
from benchmarks.streams import Load, Outcome, StreamClient, run, run_load

START_SECONDS = 30
MODEL = "metronome"
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "def", "class", "return", "import", "self")


@dataclass(frozen=True, slots=True)
class Case:
    """seconds: between two beats of the engine, 0 for as many as it can. num_tokens: of each stream."""

    name: str
    num_streams: int
    seconds: float
    num_tokens: int


# steady: each token leaves in a write of its own; goal: 90,000 and 120,000 tokens per second; overloaded: far more than
# can be written singly
CASES = (
    Case("steady_1", 1, 0.0004, 10_000),
    Case("steady_64", 64, 0.004, 1500),
    Case("steady_256", 256, 0.016, 400),
    Case("goal_64", 64, 64 / 90_000, 6000),
    Case("goal_256", 256, 256 / 120_000, 2000),
    Case("overloaded_1", 1, 0.0, 40_000),
    Case("overloaded_64", 64, 0.0, 3000),
    Case("overloaded_256", 256, 0.0, 1000),
)


def serve_metronome(port: int, seconds: float, tokenizer: str) -> int:
    """The server's process: the real one but for its engine."""
    vocab_size = Tokenizer.from_dir(tokenizer).vocab_size
    settings = Settings(
        model=MODEL, tokenizer=tokenizer, port=port, max_num_seqs=256, disable_access_log=True, log_level="warning"
    )

    def make_engine(config: EngineConfig) -> ProcessEngineClient:
        plan = EngineConfig(str(seconds), revision=str(vocab_size), max_num_seqs=config.max_num_seqs)
        return ProcessEngineClient(plan, command=(sys.executable, "-m", "benchmarks.metronome"))

    return serve(settings, make_engine)


@contextmanager
def running(seconds: float, tokenizer: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server: its port and its API process."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    arguments = ["--serve-on", str(port), "--seconds", str(seconds), "--tokenizer", tokenizer]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.api_cost", *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_ready(port)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def wait_ready(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError("the server is not ready")
        time.sleep(0.05)


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of all its threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def make_load(port: int, num_streams: int, num_tokens: int, num_requests: int) -> Load:
    return Load(
        host="127.0.0.1",
        port=port,
        api_key=None,
        model=MODEL,
        concurrency=num_streams,
        num_requests=num_requests,
        num_prompt_tokens=8,
        max_tokens=num_tokens,
        max_token_id=90,
        temperature=0.0,
        seed=0,
    )


def checked(outcome: Outcome) -> Outcome:
    if outcome.errors:
        raise RuntimeError(f"{len(outcome.errors)} requests failed: {outcome.errors[0]}")
    return outcome


def measure_tokens(case: Case, tokenizer: str) -> dict[str, Any]:
    """All streams at once, to their ends. The requests themselves are part of the cost, a small one."""
    with running(case.seconds, tokenizer) as (port, process):
        checked(run(run_load(make_load(port, case.num_streams, 8, 2 * case.num_streams))))
        before = cpu_seconds(process)
        outcome = checked(run(run_load(make_load(port, case.num_streams, case.num_tokens, case.num_streams))))
        seconds = cpu_seconds(process) - before
    num_events = len(outcome.first_arrivals) + len(outcome.gaps)
    return {
        "us_per_token": round(1e6 * seconds / outcome.num_tokens, 2),
        "tokens_per_event": round(outcome.num_tokens / num_events, 2),
        "tokens_per_s": round(outcome.num_tokens / (outcome.ended - outcome.started)),
        "gap_ms_p50": quantile(outcome.gaps, 0.5),
        "gap_ms_p99": quantile(outcome.gaps, 0.99),
    }


def text_request(port: int, dice: random.Random) -> bytes:
    """A streamed completion of one token after a text of some 32 tokens, as most clients would send it."""
    prompt = " ".join(dice.choice(WORDS) for _ in range(24))
    fields = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0.7, "stream": True}
    body = json.dumps({**fields, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Accept: */*\r\nUser-Agent: benchmark\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(port: int, num_clients: int, num_rounds: int) -> Outcome:
    """Rounds of simultaneous requests, each on a connection of its own that stays."""
    dice = random.Random(0)
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(StreamClient, "127.0.0.1", port))[1] for _ in range(num_clients)]
    outcome = Outcome()
    for _ in range(num_rounds):
        await asyncio.gather(*(client.run(text_request(port, dice), outcome) for client in clients))
    for client in clients:
        client.close()
    return outcome


def measure_requests(num_clients: int, num_rounds: int, tokenizer: str) -> dict[str, Any]:
    """Requests for one token: everything but the tokens."""
    with running(0.0, tokenizer) as (port, process):
        run(ask(port, num_clients, 2))
        before = cpu_seconds(process)
        outcome = run(ask(port, num_clients, num_rounds))
        seconds = cpu_seconds(process) - before
    return {
        "us_per_request": round(1e6 * seconds / outcome.num_answers, 1),
        "first_token_ms_p50": quantile(outcome.first_tokens, 0.5),
        "first_token_ms_worst": quantile(outcome.first_tokens, 1.0),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU time of the API process per token and per request.")
    parser.add_argument("--tokenizer", default="models/mamba-python-15m")
    parser.add_argument("--cases", default="all", help="names of cases, of those printed, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many tokens and requests")
    parser.add_argument("--serve-on", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.serve_on is not None:
        return serve_metronome(options.serve_on, options.seconds, options.tokenizer)
    wanted = options.cases.split(",")
    line: dict[str, Any] = {"benchmark": "api_cost"}
    for case in CASES:
        if case.name in wanted or wanted == ["all"]:
            scaled = Case(case.name, case.num_streams, case.seconds, max(2, int(options.scale * case.num_tokens)))
            line[case.name] = measure_tokens(scaled, options.tokenizer)
    if "requests" in wanted or wanted == ["all"]:
        line["requests"] = measure_requests(256, max(1, int(8 * options.scale)), options.tokenizer)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
