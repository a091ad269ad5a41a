"""Microseconds a layer of a decode step alone: one graph, without the head, sampling and the host.

python -m benchmarks.step --random 2.8b --batch 64,256
python -m benchmarks.step --random 130m --batch 128 --kernels
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.in_process import Subject, add_arguments, load_subject, numbers, print_line
from benchmarks.ops import captured
from mamba_core.cache import MambaCache
from mamba_core.fused_step import fused_step
from mamba_core.ops.triton.step_products import MAX_TILES

# replays timed at once, and replays that are profiled, the first of which are slow
IN_A_ROW = 4
REPLAYS = 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch", type=numbers(int), default=[1, 8, 64, 256], help="rows of a step")
    parser.add_argument("--repeats", type=int, default=10, help=f"how often to time {IN_A_ROW} replays")
    parser.add_argument("--kernels", action="store_true", help="what each kernel adds, told by the profiler")
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
    """Microseconds each, one behind the other: launching a graph takes longer than small models' steps."""
    times = []
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        replay()
        begin.record()
        for _ in range(IN_A_ROW):
            replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / IN_A_ROW)
    return times


class Kernel(NamedTuple):
    """When a kernel ended, in microseconds."""

    end: float
    name: str


def profiled_kernels(replay: Callable[[], object], replays: int) -> list[Kernel]:
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(replays):
            replay()
        torch.cuda.synchronize()
    return [Kernel(event.time_range.end, event.name) for event in profiled.events() if event.device_type.name == "CUDA"]


def delays(kernels: Sequence[Kernel], replays: int, layers: int) -> list[tuple[str, float]]:
    """By how much each kernel of a layer ends after the one before it, which is what a step waits for.

    How long a kernel runs tells little where it starts before the one before has ended. kernels: of so many replays
    of a step that has one of its own at either end, or none for each layer; the last replay is told of, in means over
    layers.
    """
    in_order = sorted(kernels, key=lambda kernel: kernel.end)
    steps, rest = divmod(len(in_order), replays)
    if rest:
        raise ValueError(f"{len(in_order)} kernels are not those of {replays} replays")
    last = in_order[-steps - 1 :]
    later = [(after.name, after.end - before.end) for before, after in pairwise(last)]
    per_layer = (steps - 1) // layers
    if per_layer == 0:
        return later
    return [
        (later[1 + i][0], statistics.mean(us for _, us in later[1 + i : 1 + per_layer * layers : per_layer]))
        for i in range(per_layer)
    ]


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
        kernels = profiled_kernels(replay, REPLAYS)
        line["us_later_than_the_one_before"] = [
            (name[:40], round(us, 2)) for name, us in delays(kernels, REPLAYS, layers)
        ]
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
