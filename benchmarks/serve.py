"""Concurrent streaming clients against a running server: one JSON line per concurrency.

Time to first token and the gaps between tokens are measured per stream, from the moment its request is written;
tokens are those that the server's usage counts. Clients run in processes of their own. With ``--intruder-tokens`` one
more request comes while the streams run, with a prompt that long, and the gaps before it and beside it are told apart.
Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import sys
import time
import urllib.request
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from benchmarks.streams import Load, Outcome, allow_open_files, run, run_load, total

__all__ = ["Load", "Outcome", "measure", "quantile", "report", "run_load", "split"]


def _stream(load: Load, barrier: Any, results: Any) -> None:
    allow_open_files(load.concurrency)
    gc.disable()  # a collection would look like a gap of the server's
    results.put(run(run_load(load, barrier.wait)))


def _intrude(load: Load, after: float, barrier: Any, results: Any) -> None:
    barrier.wait()
    time.sleep(after)
    results.put(run(run_load(load)))


def measure(loads: Sequence[Load], intruder: Load | None = None, after: float = 0.0) -> tuple[Outcome, Outcome | None]:
    """Run each load in a process of its own, all at once, and the intruder ``after`` seconds later.

    Returns what the streams saw, and what the intruder did.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(loads) + (intruder is not None))
    results, seen = context.SimpleQueue(), context.SimpleQueue()
    workers = [context.Process(target=_stream, args=(load, barrier, results), daemon=True) for load in loads]
    if intruder is not None:
        workers.append(context.Process(target=_intrude, args=(intruder, after, barrier, seen), daemon=True))
    for worker in workers:
        worker.start()
    outcome = total([results.get() for _ in loads])
    intrusion = seen.get() if intruder is not None else None
    for worker in workers:
        worker.join()
    return outcome, intrusion


def split(load: Load, num_processes: int) -> list[Load]:
    """The load in equal shares, with prompts of their own."""
    num_processes = min(num_processes, load.concurrency)
    shares = []
    for number in range(num_processes):
        concurrency = _share(load.concurrency, num_processes, number)
        num_requests = _share(load.num_requests, num_processes, number)
        seed = load.seed * 1000 + number
        shares.append(dataclasses.replace(load, concurrency=concurrency, num_requests=num_requests, seed=seed))
    return shares


def _share(whole: int, num_parts: int, number: int) -> int:
    return whole // num_parts + (number < whole % num_parts)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that ``share`` of all do not exceed, in milliseconds."""
    return _quantile(sorted(values), share)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def _quantiles(values: Iterable[float], **shares: float) -> dict[str, float | None]:
    ordered = sorted(values)
    return {name: _quantile(ordered, share) for name, share in shares.items()}


_gaps = partial(_quantiles, p50=0.5, p99=0.99, worst=1.0)


def report(load: Load, num_processes: int, outcome: Outcome) -> dict[str, Any]:
    """One line of results. ``tokens_per_s`` counts the time in which streams begin and end, ``steady_...`` does not."""
    seconds = outcome.ended - outcome.started if outcome.num_answers else 0.0
    steady = outcome.steady_tokens_per_s()
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
        "ttft_ms": _quantiles(outcome.first_tokens, median=0.5, p99=0.99, worst=1.0),
        "inter_token_ms": _gaps(outcome.gaps),
        "num_tokens": outcome.num_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(outcome.num_tokens / seconds, 1) if seconds else None,
        "steady_tokens_per_s": round(steady, 1) if steady else None,
    }


def report_intruder(intruder: Load, seen: Outcome, streams: Outcome) -> dict[str, Any]:
    """What a long prompt met, and what it did to the gaps of the streams beside it."""
    if not seen.first_tokens:
        return {"prompt_tokens": intruder.num_prompt_tokens, "first_error": next(iter(seen.errors), "no token came")}
    asked, answered = seen.started, seen.started + seen.first_tokens[0]
    gaps = list(zip(streams.gaps, streams.gap_ends, strict=True))
    # a gap that has begun when the answer comes was still beside the prompt
    beside = [gap for gap, end in gaps if end > asked and end - gap < answered]
    return {
        "prompt_tokens": intruder.num_prompt_tokens,
        "ttft_ms": round(1e3 * seen.first_tokens[0], 3),
        "gaps_before_ms": _gaps(gap for gap, end in gaps if streams.steady_from < end <= asked),
        "gaps_beside_ms": _gaps(beside),
        "num_gaps_beside": len(beside),
        "outlived_streams": answered > streams.steady_until,
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
    parser.add_argument("--max-token-id", type=int, default=250, help="prompts are random ids from 16 to this one")
    parser.add_argument("--warmup", type=int, default=1, help="requests per stream that are not measured")
    parser.add_argument("--intruder-tokens", type=int, help="prompt of one more request while the streams run")
    parser.add_argument("--intruder-after", type=float, default=1.0, help="seconds after which it comes")
    parser.add_argument("--api-key")
    parser.add_argument("--model", help="the served model when not given")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load_of(options: argparse.Namespace, concurrency: int) -> Load:
    """All requests of one line of results."""
    address = urlsplit(options.url)
    return Load(
        host=address.hostname or "127.0.0.1",
        port=address.port or 80,
        api_key=options.api_key,
        model=options.model or find_model(options.url.rstrip("/"), options.api_key),
        concurrency=concurrency,
        num_requests=options.num_requests or 4 * concurrency,
        num_prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        max_token_id=options.max_token_id,
        temperature=options.temperature,
        seed=options.seed,
    )


def intruder_of(load: Load, num_prompt_tokens: int) -> Load:
    """One request for one token after a long prompt."""
    return dataclasses.replace(
        load, concurrency=1, num_requests=1, num_prompt_tokens=num_prompt_tokens, max_tokens=1, seed=load.seed - 2
    )


def warm_up(loads: Iterable[Load], num_requests: int) -> None:
    """Requests of the same shapes that are not measured."""
    for load in loads:
        allow_open_files(load.concurrency)
        num = num_requests * load.concurrency
        run(run_load(dataclasses.replace(load, num_requests=num, max_tokens=min(8, load.max_tokens), seed=-1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code is 1 when a request failed."""
    options = parse(arguments)
    has_errors = False
    for concurrency in map(int, options.concurrency.split(",")):
        load = load_of(options, concurrency)
        intruder = intruder_of(load, options.intruder_tokens) if options.intruder_tokens else None
        if options.warmup:
            warm_up(filter(None, (load, intruder)), options.warmup)
        loads = split(load, options.processes)
        outcome, seen = measure(loads, intruder, options.intruder_after)
        line = report(load, len(loads), outcome)
        if intruder is not None and seen is not None:
            line["intruder"] = report_intruder(intruder, seen, outcome)
            outcome.errors += seen.errors
        has_errors = has_errors or bool(outcome.errors)
        print(json.dumps(line), flush=True)
    return 1 if has_errors else 0


if __name__ == "__main__":
    sys.exit(main())
