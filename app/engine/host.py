"""Between numbers on the host and tensors on the device, without either waiting for the other."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


def to_device(values: array[int] | array[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor; dtype is the array's own: "q" int64, "f" float32. On a CPU the memory is shared."""
    if not values:
        return torch.empty(0, dtype=dtype, device=device)
    host = torch.frombuffer(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    # a copy from pageable memory may wait for the stream; torch gives a pinned block out again only after its copy
    return host.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """The values on the host, to be read after a mark made later has been waited for."""
    if values.device.type != "cuda":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


class Mark(Protocol):
    """A point in the work of a device."""

    def wait(self) -> None:
        """Return once everything launched before the mark is done. Raises what the device raises."""

    def seconds_since(self, earlier: Self) -> float:
        """Time between two marks that have been waited for."""


class DeviceMark:
    """An event in the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: DeviceMark) -> float:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return 1e-3 * milliseconds


@dataclass(slots=True)
class HostMark:
    """On a CPU a launch returns when the work is done."""

    time: float

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: HostMark) -> float:
        return self.time - earlier.time


def mark(device: torch.device) -> Mark:
    """A mark behind everything launched so far."""
    return DeviceMark() if device.type == "cuda" else HostMark(time.perf_counter())
