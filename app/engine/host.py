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


class Outbox(Protocol):
    """Sends tensors to the host while the device goes on.

    What is sent must be in memory of its own, and may be written again after ``wait``.
    """

    def send(self, values: Tensor) -> tuple[Tensor, Mark]:
        """The values on the host, as they are after everything launched so far, and the mark behind which they are."""

    def wait(self) -> None:
        """Let what is launched from now on wait for what has been sent; in a graph, at each replay."""


class DeviceOutbox:
    """Copies on a stream of its own: on the stream of the steps, each would hold up the next step by some 7 us."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # a graph that waits for an external event waits at each replay, for the last time it was recorded
        self._sent = torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
        self._sent.record(self._stream)

    def send(self, values: Tensor) -> tuple[Tensor, Mark]:
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(self._stream):
            host = to_host(values)
            self._sent.record()
            sent = DeviceMark()
        return host, sent

    def wait(self) -> None:
        self._sent.wait()


class HostOutbox:
    """On a CPU, where a launch returns when the work is done: what is sent is kept as it is."""

    def send(self, values: Tensor) -> tuple[Tensor, Mark]:
        return values.clone(), HostMark(time.perf_counter())

    def wait(self) -> None:
        pass


def outbox(device: torch.device) -> Outbox:
    """One for tensors of the device."""
    return DeviceOutbox(device) if device.type == "cuda" else HostOutbox()
