"""Milliseconds per decode step of the engine, beside the least the machine could take.

python -m benchmarks.decode --random 130m --device cpu --batch 1,8,64
python -m benchmarks.decode --model models/mamba-python-15m
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from app.engine.engine import Engine
from benchmarks.in_process import Subject, add_arguments, drain, greedy_request, load_subject, numbers, print_line

WARM_UP_STEPS = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch", type=numbers(int), default=[1, 8, 64], help="rows that decode together")
    parser.add_argument("--tokens", type=int, default=128, help="steps to time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    return parser.parse_args(arguments)


def start_rows(engine: Engine, num_rows: int, options: argparse.Namespace, vocab_size: int) -> None:
    """Bring ``num_rows`` sequences into decode, where they stay for the steps to come."""
    # every prompt may need a step of its own, in which those before it decode, and steps may be told of one late
    max_tokens = options.tokens + WARM_UP_STEPS + num_rows + 4
    for row in range(num_rows):
        engine.submit(greedy_request(f"{num_rows}-{row}", options.prompt, max_tokens, vocab_size))
    while engine.stats.last_step_rows < num_rows or engine.stats.last_step_prefill_tokens:
        engine.step()


def time_steps(engine: Engine, num_steps: int) -> list[float]:
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def run_case(subject: Subject, engine: Engine, num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    start_rows(engine, num_rows, options, subject.config.vocab_size)
    time_steps(engine, WARM_UP_STEPS)
    seconds = time_steps(engine, options.tokens)
    assert engine.stats.last_step_rows == num_rows
    drain(engine)
    median, floor = statistics.median(seconds), subject.floor_seconds(num_rows, num_rows)
    return {
        "benchmark": "decode",
        **subject.describe(),
        "batch": num_rows,
        "steps": len(seconds),
        "ms_per_step": round(1e3 * median, 4),
        "ms_mean": round(1e3 * statistics.fmean(seconds), 4),
        "tokens_per_s": round(num_rows * len(seconds) / sum(seconds), 1),
        "floor_ms": round(1e3 * floor, 4),
        "ratio_to_floor": round(median / floor, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    subject = load_subject(options)
    engine = subject.engine(max(options.batch), prefill_budget=8192)
    # what a server does while it is idle
    while engine.prepare_more():
        pass
    for num_rows in options.batch:
        print_line(run_case(subject, engine, num_rows, options))


if __name__ == "__main__":
    main()
