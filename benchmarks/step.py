"""Microseconds a layer of a decode step alone: one graph, without the head, sampling and the host.

python -m benchmarks.step --random 2.8b --batch 64,256
python -m benchmarks.step --random 130m --batch 128 --kernels
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.in_process import Subject, add_arguments, load_subject, numbers, print_line
from benchmarks.ops import captured
from mamba_core.cache import MambaCache
from mamba_core.fused_step import fused_step
from mamba_core.ops.triton.step_products import MAX_TILES

WARM_UP = 3
# of the kernels told with --kernels, the longest
MOST_KERNELS = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch", type=numbers(int), default=[1, 8, 64, 256], help="rows of a step")
    parser.add_argument("--repeats", type=int, default=30, help="replays to time")
    parser.add_argument("--kernels", action="store_true", help="how long each kernel takes, told by the profiler")
    return parser.parse_args(arguments)


def capture(subject: Subject, num_rows: int) -> Callable[[], object]:
    """A step of rows whose states lag wherever steps of so many do."""
    cache = MambaCache.from_config(
        subject.config,
        num_rows + 1,
        dtype=subject.dtype,
        state_dtype=subject.state_dtype,
        device=subject.device,
        may_lag=subject.state_dtype == torch.float32,
    )
    slots = 1 + torch.randperm(num_rows, device=subject.device)
    tokens = torch.randint(subject.config.vocab_size, (num_rows,), device=subject.device)
    counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=subject.device)

    def step() -> None:
        fused_step(subject.model.backbone, tokens, slots, cache, counters, may_lag=True)

    step()
    return captured(step)


def time_replays(replay: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds each."""
    times = []
    for _ in range(WARM_UP + repeats):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return times[WARM_UP:]


def time_kernels(replay: Callable[[], object], repeats: int) -> dict[str, float]:
    """Microseconds of each kernel in a replay; those that overlap count in full."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            replay()
        torch.cuda.synchronize()
    total = {event.key: event.device_time_total / repeats for event in profiled.key_averages()}
    return dict(sorted(total.items(), key=lambda item: -item[1])[:MOST_KERNELS])


def run_case(subject: Subject, num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    replay, layers = capture(subject, num_rows), subject.config.num_hidden_layers
    times = time_replays(replay, options.repeats)
    line = {
        "benchmark": "step",
        **subject.describe(),
        "batch": num_rows,
        "us_per_layer": round(statistics.median(times) / layers, 2),
        "ms": round(statistics.median(times) / 1e3, 4),
    }
    if options.kernels:
        kernels = time_kernels(replay, WARM_UP)
        line["kernels_us_per_layer"] = {name[:60]: round(us / layers, 2) for name, us in kernels.items()}
    return line


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if torch.device(options.device).type != "cuda":
        raise SystemExit("a step as one graph needs a GPU: --device cuda")
    subject = load_subject(options)
    for num_rows in options.batch:
        print_line(run_case(subject, num_rows, options))


if __name__ == "__main__":
    main()
