"""Work shared out among the threads that torch has anyway."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numba import carray, from_dtype, njit, types

from mamba_core.ops.machine.memory import fetch_add
from mamba_core.ops.machine.openmp import find_openmp
from mamba_core.ops.packing import HostRows, Packing


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


def rows_of(packing: Packing, state: torch.Tensor, x: torch.Tensor) -> HostRows:
    """The rows of a call. Raises IndexError for slots and tokens that there are not."""
    rows = packing.host_rows
    low, high = rows.slot_range or (0, 0)
    if rows.slot_range is not None and not 0 <= low <= high < len(state):
        raise IndexError(f"slots {low} to {high} of a state with {len(state)}")
    low, high = rows.bound_range
    if not 0 <= low <= high <= len(x):
        raise IndexError(f"sequences from {low} to {high} in {len(x)} tokens")
    return rows


@njit(error_model="numpy")
def take_tasks(pointer: Any, do_task: Any) -> None:
    """Do tasks of ``run``, as a worker, until none is left: ``do_task`` gets the arguments and a task's number."""
    arguments = carray(pointer, 1)
    a, counter = arguments[0], arguments.ctypes.data
    task = fetch_add(counter, 1)
    while task < a.num_tasks:
        do_task(a, task)
        task = fetch_add(counter, 1)


def run(worker: Any, arguments: Iterable[int], num_tasks: int) -> None:
    """Call a numba callback on all threads with a pointer to: 0, the counter of tasks; their number; the arguments."""
    numbers = array("q", (0, num_tasks, *arguments))
    address, num_threads = numbers.buffer_info()[0], min(torch.get_num_threads(), num_tasks)
    openmp = find_openmp()
    if num_threads <= 1:
        worker.ctypes(address)
    elif openmp is not None:
        openmp.run(worker.address, address, num_threads)
    else:
        threads = [threading.Thread(target=worker.ctypes, args=(address,)) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
