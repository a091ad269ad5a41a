"""What the machine can do at best, measured before anything is compared with it: bandwidth and matrix products."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

# far larger than any cache: 1 GiB on a GPU, 256 MiB on a CPU
_BUFFER_BYTES = {"cuda": 2**30, "cpu": 2**28}
_PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
_REPEATS = 10


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of one device: bytes per second read or copied, floating-point operations per second in products."""

    device: str
    copy_bytes_per_s: float
    read_bytes_per_s: float
    product_flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def floor_seconds(self, num_bytes: float, flops: float) -> float:
        """The least time in which that much can be moved and multiplied, both at once."""
        return max(num_bytes / self.bytes_per_s, flops / self.product_flops_per_s)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Time copies, reads and matrix products in ``dtype``; a few seconds."""
    num_elements = _BUFFER_BYTES[device.type] // 4
    source = torch.ones(num_elements, device=device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    read = best_seconds(lambda: source.sum(), device)
    size = _PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = best_seconds(lambda: torch.mm(left, right), device)
    return Machine(
        device=device_name(device),
        copy_bytes_per_s=2 * source.nbytes / copy,
        read_bytes_per_s=source.nbytes / read,
        product_flops_per_s=2 * size**3 / product,
    )


def best_seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """The fastest of ten runs after two to warm up."""
    times = []
    for _ in range(_REPEATS + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next((line for line in _cpu_lines() if line.startswith("model name")), "")
    name = model.partition(":")[2].strip() or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the speed; a library that is absent is left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
