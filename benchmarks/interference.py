"""What a long prompt costs those who stream beside it: time between the tokens of running rows, before and meanwhile.

python -m benchmarks.interference --random 130m --rows 64 --prompt 32768
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from app.engine.engine import Engine
from benchmarks.in_process import Subject, add_arguments, drain, greedy_request, load_subject, print_line

SHORT_PROMPT = 32
# steps that find out how many prompt tokens to take, and are not counted
LEARNING_STEPS = 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=64, help="rows that stream")
    parser.add_argument("--prompt", type=int, default=32_768, help="tokens of the long prompt")
    parser.add_argument("--tokens", type=int, default=200, help="undisturbed steps to time")
    parser.add_argument("--budget", type=int, default=8192, help="prompt tokens that a step may take at most")
    return parser.parse_args(arguments)


def time_steps(engine: Engine, num_steps: int) -> list[float]:
    return [_time_step(engine) for _ in range(num_steps)]


def time_until_prefilled(engine: Engine, num_tokens: int) -> list[float]:
    """Periods of the steps that take the next ``num_tokens`` prompt tokens."""
    seconds, done = [], engine.stats.num_prefill_tokens
    while engine.stats.num_prefill_tokens < done + num_tokens:
        seconds.append(_time_step(engine))
    return seconds


def run(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    engine = subject.engine(options.rows + 1, options.budget)
    while engine.prepare_more():
        pass
    vocab_size = subject.config.vocab_size
    for row in range(options.rows):
        engine.submit(greedy_request(f"row-{row}", SHORT_PROMPT, 10**6, vocab_size))
    while engine.stats.last_step_rows < options.rows:
        engine.step()
    time_steps(engine, LEARNING_STEPS)
    undisturbed = time_steps(engine, options.tokens)
    # once to learn what prompt tokens cost, and to compile
    engine.submit(greedy_request("first", options.prompt // 4, 1, vocab_size))
    time_until_prefilled(engine, options.prompt // 4 - 1)
    time_steps(engine, LEARNING_STEPS)
    engine.submit(greedy_request("long", options.prompt, 1, vocab_size))
    disturbed = time_until_prefilled(engine, options.prompt - 1)
    for row in range(options.rows):
        engine.abort(f"row-{row}")
    drain(engine)
    return {
        "benchmark": "interference",
        **subject.describe(),
        "rows": options.rows,
        "prompt": options.prompt,
        "undisturbed": _summary(undisturbed),
        "disturbed": _summary(disturbed),
        "prompt_seconds": round(sum(disturbed), 3),
        "prompt_tokens_per_step": round(options.prompt / len(disturbed)),
    }


def _time_step(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"median": 0.5, "p99": 0.99, "worst": 1.0}
    return {f"{name}_ms": round(1e3 * ordered[round(q * (len(ordered) - 1))], 3) for name, q in at.items()}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    print_line(run(load_subject(options), options))


if __name__ == "__main__":
    main()
