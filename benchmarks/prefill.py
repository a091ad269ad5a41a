"""Prompt tokens per second through the engine, beside the most the machine could take.

The engine takes all prompts of a case at once and draws one token for each of them.

    python -m benchmarks.prefill --random 130m --device cpu --shape 1x512,4x512
    python -m benchmarks.prefill --model models/mamba-python-15m
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from app.engine.engine import Engine
from benchmarks.in_process import Subject, add_arguments, drain, greedy_request, load_subject, numbers, print_line


def shape(text: str) -> tuple[int, int]:
    """``8x2048``: eight prompts of 2048 tokens."""
    num_prompts, length = (int(part) for part in text.split("x"))
    return num_prompts, length


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--shape", type=numbers(shape), default=[(1, 2048), (8, 2048)], help="prompts x tokens")
    parser.add_argument("--repeats", type=int, default=5, help="times each case is run, after once to warm up")
    return parser.parse_args(arguments)


def time_prompts(engine: Engine, num_prompts: int, length: int, vocab_size: int) -> float:
    for index in range(num_prompts):
        engine.submit(greedy_request(f"{length}-{index}", length, 1, vocab_size))
    before = engine.stats.num_prefill_tokens
    num_tokens = 0
    start = time.perf_counter()
    # an engine may tell of a step only after it has begun the next
    while num_tokens < num_prompts:
        num_tokens += len(engine.step())
    seconds = time.perf_counter() - start
    # the last token of a prompt is counted with what it draws
    assert engine.stats.num_prefill_tokens - before == num_prompts * (length - 1)
    drain(engine)
    return seconds


def run_case(subject: Subject, engine: Engine, num_prompts: int, length: int, repeats: int) -> dict[str, Any]:
    vocab_size = subject.config.vocab_size
    time_prompts(engine, num_prompts, length, vocab_size)
    seconds = [time_prompts(engine, num_prompts, length, vocab_size) for _ in range(repeats)]
    median, num_tokens = statistics.median(seconds), num_prompts * length
    floor = subject.floor_seconds(num_tokens, num_prompts)
    return {
        "benchmark": "prefill",
        **subject.describe(),
        "shape": f"{num_prompts}x{length}",
        "repeats": repeats,
        "ms": round(1e3 * median, 3),
        "ms_best": round(1e3 * min(seconds), 3),
        "tokens_per_s": round(num_tokens / median, 1),
        "floor_ms": round(1e3 * floor, 3),
        "ratio_to_floor": round(median / floor, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    subject = load_subject(options)
    num_slots = max(num_prompts for num_prompts, _ in options.shape)
    engine = subject.engine(num_slots, prefill_budget=max(rows * length for rows, length in options.shape))
    # what a server does while it is idle
    while engine.prepare_more():
        pass
    for num_prompts, length in options.shape:
        print_line(run_case(subject, engine, num_prompts, length, options.repeats))


if __name__ == "__main__":
    main()
