"""Work shared out among the threads that torch has anyway."""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cfunc, from_dtype, types


def record_of(names: Iterable[str]) -> Any:
    """The type of a pointer to int64 numbers with these names."""
    return types.CPointer(from_dtype(np.dtype([(name, np.int64) for name in names])))


def matrix_names(name: str) -> tuple[str, str, str]:
    """Names of what ``matrix`` gives."""
    return name, f"{name}_stride", f"{name}_size"


def plain(t: torch.Tensor) -> torch.Tensor:
    """A matrix that the kernels can read: fp32 or bf16, its rows contiguous."""
    if t.dtype not in (torch.float32, torch.bfloat16):
        t = t.float()
    return t if t.stride(-1) == 1 else t.contiguous()


def flat(t: torch.Tensor) -> torch.Tensor:
    """A parameter as fp32 numbers side by side."""
    return t.detach().float().contiguous()


def matrix(t: torch.Tensor) -> tuple[int, int, int]:
    """A tensor with contiguous rows as its address, the bytes from row to row, and the bytes of a number."""
    return t.data_ptr(), t.stride(0) * t.itemsize, t.itemsize


def expect(**tensors: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError where a tensor, given by name, has not the shape beside it or is not on the CPU."""
    for name, (t, shape) in tensors.items():
        if t.shape != shape or t.device.type != "cpu":
            raise ValueError(f"{name} must have shape {shape} on the CPU, got {tuple(t.shape)} on {t.device}")


def rows(slots: torch.Tensor, bounds: torch.Tensor, state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Slots and bounds of sequences, as the kernels read them. Raises IndexError for slots and tokens there are not."""
    expect(slots=(slots, (len(slots),)), bounds=(bounds, (len(slots) + 1,)))
    numbers, limits = slots.tolist(), bounds.tolist()
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(state):
        raise IndexError(f"slots {min(numbers)} to {max(numbers)} of a state with {len(state)}")
    if not 0 <= min(limits) <= max(limits) <= len(x):
        raise IndexError(f"sequences from {min(limits)} to {max(limits)} in {len(x)} tokens")
    return slots.to(torch.int64).contiguous(), bounds.to(torch.int32).contiguous()


@cache
def _parallel() -> Any | None:
    """OpenMP's entry point in the library that torch's own operations run on, if it has the one GCC gives it.

    A second pool of threads would fight with torch's, which go on spinning for a while after each operation.
    """
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


def callback(record: Any) -> Callable[[Callable[[Any], None]], Any]:
    """Compile a function of a pointer to ``record``; later processes find its machine code, where it can be kept."""

    def decorate(function: Callable[[Any], None]) -> Any:
        signature = types.void(record)
        try:
            return cfunc(signature, cache=True, error_model="numpy")(function)
        except (RuntimeError, OSError):
            # there is no directory that could be written to, or no room in it
            return cfunc(signature, error_model="numpy")(function)

    return decorate


def run(worker: Any, arguments: Iterable[int], num_tasks: int) -> None:
    """Call a numba callback on all threads with a pointer to: 0, the counter of tasks; their number; the arguments."""
    numbers = array("q", (0, num_tasks, *arguments))
    address, num_threads = numbers.buffer_info()[0], min(torch.get_num_threads(), num_tasks)
    parallel = _parallel()
    if num_threads <= 1:
        worker.ctypes(address)
    elif parallel is not None:
        parallel(worker.address, address, num_threads, 0)
    else:
        threads = [threading.Thread(target=worker.ctypes, args=(address,)) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
