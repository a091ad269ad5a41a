"""Each op of ``mamba_core.ops`` alone, beside the least time its bytes and exponentials could take.

    python -m benchmarks.ops --device cuda
    python -m benchmarks.ops --device cpu --only scan

The floor of a case is the larger of the bytes it must move, over the copy bandwidth measured first, and the
exponentials of its recurrence, one per token, channel and state, over the rate at which the device can make them.
On a GPU every case but the backward pass runs inside a CUDA graph, as decoding does, and works on as many distinct
sets of tensors as it takes to leave nothing in the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import best_seconds, device_name, synchronize, versions
from mamba_core import ops
from mamba_core.ops import Packing

NUM_STATES, WIDTH = 16, 4
# per multiprocessor and cycle, and the clock: Hopper's special-function units
_EXPONENTIALS_PER_CYCLE, _CLOCK_GHZ = 16, 1.98
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
# more than any L2 cache holds; on a CPU caches are left as they are
_WORKING_SET_BYTES = {"cuda": 2**28, "cpu": 0}
_MOST_SETS = 64

SCAN_SHAPES = {
    "cuda": [
        (1, 512, 1536),
        (1, 2048, 1536),
        (8, 2048, 1536),
        (1, 2048, 5120),
        (8, 2048, 5120),
        (1, 32768, 5120),
        (32, 512, 5120),
    ],
    "cpu": [(1, 64, 1536), (1, 512, 1536), (8, 64, 1536)],
}
TRAINING_SHAPES = {"cuda": [(64, 1024, 768)], "cpu": [(2, 64, 256)]}
STEP_SHAPES = {
    "cuda": [(rows, channels) for channels in (1536, 5120) for rows in (1, 64, 256)],
    "cpu": [(rows, 1536) for rows in (1, 8)],
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device can do at best: bytes copied and exponentials made, per second."""

    bytes_per_s: float
    exponentials_per_s: float


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape: how to make a set of its tensors and run it on them, and what it cannot do without."""

    op: str
    shape: str
    prepare: Callable[[], Callable[[], object]]
    num_bytes: int
    num_exponentials: int = 0
    in_graph: bool = True


class Maker:
    """Random tensors of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=dtype)

    def packing(self, num_rows: int, length: int) -> Packing:
        packing = Packing.from_lengths([length] * num_rows, self.slots(num_rows))
        # made once per forward pass, not once per op
        _ = packing.seq_idx
        return packing

    def slots(self, num_rows: int) -> Tensor:
        return torch.arange(num_rows, device=self.device)

    def scan_inputs(self, num_tokens: int, num_channels: int) -> dict[str, Tensor]:
        """As the model makes them: x and z are halves of one projection, B and C slices of another."""
        xz = self.random(num_tokens, 2 * num_channels)
        rank = num_channels // 32
        low_rank = self.random(num_tokens, rank + 2 * NUM_STATES)
        A = -torch.arange(1, NUM_STATES + 1, device=self.device).float().repeat(num_channels, 1)
        return {
            "x": xz[:, :num_channels],
            "dt": self.random(num_tokens, num_channels),
            "A": A,
            "B": low_rank[:, rank : rank + NUM_STATES],
            "C": low_rank[:, rank + NUM_STATES :],
            "D": self.random(num_channels),
            "z": xz[:, num_channels:],
            "dt_bias": self.random(num_channels),
        }


def scan_case(make: Maker, rows: int, length: int, channels: int) -> Case:
    tokens = rows * length

    def prepare() -> Callable[[], object]:
        inputs, packing = make.scan_inputs(tokens, channels), make.packing(rows, length)
        state = make.zeros(rows, channels, NUM_STATES)
        return lambda: ops.selective_scan(**inputs, state=state, packing=packing)

    num_bytes = _scan_bytes(make, tokens, channels, 4, 2) + 2 * 4 * rows * channels * NUM_STATES
    return Case("selective_scan", f"{rows}x{length}x{channels}", prepare, num_bytes, tokens * channels * NUM_STATES)


def scan_backward_case(make: Maker, rows: int, length: int, channels: int) -> Case:
    tokens = rows * length

    def prepare() -> Callable[[], object]:
        inputs = {name: t.detach().requires_grad_() for name, t in make.scan_inputs(tokens, channels).items()}
        state = make.zeros(rows, channels, NUM_STATES)
        y = ops.selective_scan(**inputs, state=state, packing=make.packing(rows, length))
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)

    num_bytes = _scan_bytes(make, tokens, channels, 7, 4)
    shape, exponentials = f"{rows}x{length}x{channels}", tokens * channels * NUM_STATES
    return Case("selective_scan backward", shape, prepare, num_bytes, exponentials, in_graph=False)


def _scan_bytes(make: Maker, tokens: int, channels: int, wide: int, narrow: int) -> int:
    """Of tensors [T, D] and [T, N], each moved once."""
    return make.dtype.itemsize * tokens * (wide * channels + narrow * NUM_STATES)


def scan_step_case(make: Maker, rows: int, channels: int) -> Case:
    def prepare() -> Callable[[], object]:
        inputs, slots = make.scan_inputs(rows, channels), make.slots(rows)
        state = make.zeros(rows, channels, NUM_STATES)
        return lambda: ops.selective_scan_step(**inputs, state=state, slots=slots)

    states = 4 * channels * NUM_STATES
    num_bytes = (2 * rows + 1) * states + _scan_bytes(make, rows, channels, 4, 2)
    return Case("selective_scan_step", f"{rows}x{channels}", prepare, num_bytes, rows * channels * NUM_STATES)


def conv_case(make: Maker, rows: int, length: int, channels: int) -> Case:
    def prepare() -> Callable[[], object]:
        x, packing = make.random(rows * length, 2 * channels)[:, :channels], make.packing(rows, length)
        weight, bias = make.random(channels, WIDTH), make.random(channels)
        state = make.zeros(rows, channels, WIDTH - 1, dtype=make.dtype)
        return lambda: ops.causal_conv1d(x, weight, bias, state, packing)

    num_bytes = make.dtype.itemsize * channels * (2 * rows * length + 2 * rows * (WIDTH - 1) + WIDTH + 1)
    return Case("causal_conv1d", f"{rows}x{length}x{channels}", prepare, num_bytes)


def conv_backward_case(make: Maker, rows: int, length: int, channels: int) -> Case:
    def prepare() -> Callable[[], object]:
        leaves = [make.random(*s).requires_grad_() for s in ((rows * length, channels), (channels, WIDTH), (channels,))]
        state = make.zeros(rows, channels, WIDTH - 1, dtype=make.dtype)
        y = ops.causal_conv1d(leaves[0], leaves[1], leaves[2], state, make.packing(rows, length))
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    num_bytes = make.dtype.itemsize * channels * 3 * rows * length
    return Case("causal_conv1d backward", f"{rows}x{length}x{channels}", prepare, num_bytes, in_graph=False)


def conv_step_case(make: Maker, rows: int, channels: int) -> Case:
    def prepare() -> Callable[[], object]:
        x, slots = make.random(rows, 2 * channels)[:, :channels], make.slots(rows)
        weight, bias = make.random(channels, WIDTH), make.random(channels)
        state = make.zeros(rows, channels, WIDTH - 1, dtype=make.dtype)
        return lambda: ops.causal_conv1d_step(x, weight, bias, state, slots)

    num_bytes = make.dtype.itemsize * channels * (2 * rows + 2 * rows * (WIDTH - 1) + WIDTH + 1)
    return Case("causal_conv1d_step", f"{rows}x{channels}", prepare, num_bytes)


def norm_case(make: Maker, rows: int, length: int, channels: int) -> Case:
    def prepare() -> Callable[[], object]:
        x, residual = make.random(rows * length, channels), make.random(rows * length, channels).float()
        weight = make.random(channels)
        return lambda: ops.rms_norm_residual(x, residual, weight, 1e-5)

    num_bytes = rows * length * channels * 2 * (make.dtype.itemsize + 4)
    return Case("rms_norm_residual", f"{rows}x{length}x{channels}", prepare, num_bytes)


def cases(make: Maker) -> Iterator[Case]:
    """All cases of the device, in the order they are printed."""
    kind = make.device.type
    for shape in SCAN_SHAPES[kind]:
        yield scan_case(make, *shape)
    for shape in TRAINING_SHAPES[kind]:
        yield scan_case(make, *shape)
        yield scan_backward_case(make, *shape)
    for rows, channels in STEP_SHAPES[kind]:
        yield scan_step_case(make, rows, channels)
        yield conv_step_case(make, rows, channels)
    for shape in SCAN_SHAPES[kind][1:3] + TRAINING_SHAPES[kind]:
        yield conv_case(make, *shape)
    for rows, length, channels in TRAINING_SHAPES[kind]:
        yield conv_backward_case(make, rows, length, channels)
        yield norm_case(make, rows, length, channels // 2)


def measure_rates(device: torch.device) -> Rates:
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return Rates(copy, 1e9 * _EXPONENTIALS_PER_CYCLE * _CLOCK_GHZ * processors)
    # small enough for the caches, large enough for all threads
    exponents = torch.linspace(-9, 0, 2**18)
    results = torch.empty_like(exponents)
    return Rates(copy, exponents.numel() / best_seconds(lambda: torch.exp(exponents, out=results), device))


def median_seconds(case: Case, device: torch.device, repeats: int) -> float:
    """Of one run of the op; on a GPU by its own clock."""
    sets = max(1, min(_MOST_SETS, math.ceil(_WORKING_SET_BYTES[device.type] / case.num_bytes)))
    runs = [case.prepare() for _ in range(sets if case.in_graph else 1)]

    def run_all() -> None:
        for run in runs:
            run()

    run_all()
    if device.type == "cpu":
        return _median_of(repeats, lambda: _host_seconds(run_all)) / len(runs)
    once = captured(run_all) if case.in_graph else run_all
    once()
    return _median_of(repeats, lambda: _device_seconds(once, device)) / len(runs)


def _median_of(repeats: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(repeats))


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_seconds(run: Callable[[], object], device: torch.device) -> float:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    synchronize(device)
    start.record()
    run()
    end.record()
    synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """What replays a run, which has been made once before, as a CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph.replay


def result(case: Case, seconds: float, rates: Rates, make: Maker) -> dict[str, Any]:
    floor = max(case.num_bytes / rates.bytes_per_s, case.num_exponentials / rates.exponentials_per_s)
    line: dict[str, Any] = {
        "benchmark": "ops",
        "op": case.op,
        "shape": case.shape,
        "dtype": str(make.dtype).removeprefix("torch."),
        "ms": round(1e3 * seconds, 5),
        "floor_ms": round(1e3 * floor, 5),
        "ratio_to_floor": round(seconds / floor, 2),
        "gb_per_s": round(case.num_bytes / seconds / 1e9, 1),
    }
    if case.num_exponentials:
        line["exponentials_per_ns"] = round(case.num_exponentials / seconds / 1e9, 1)
    return line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="run the ops whose name contains this")
    parser.add_argument("--repeats", type=int, default=20, help="times each case is run, after once to warm up")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    make = Maker(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    rates = measure_rates(device)
    machine = {
        "device": device_name(device),
        "copy_gb_per_s": round(rates.bytes_per_s / 1e9, 1),
        "exponentials_per_ns": round(rates.exponentials_per_s / 1e9, 2),
        "versions": versions(),
    }
    print(json.dumps(machine), flush=True)
    for case in cases(make):
        if options.only in case.op:
            seconds = median_seconds(case, device, options.repeats)
            print(json.dumps(result(case, seconds, rates, make)), flush=True)


if __name__ == "__main__":
    main()
