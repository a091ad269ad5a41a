"""Loads and stores of numbers whose size in bytes is known when a kernel runs: fp32 or bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from mamba_core.ops.machine import memory
from mamba_core.ops.machine.instructions import LANES

WIDTH = LANES


@njit(forceinline=True)
def load(address: int, itemsize: int, count: int) -> Any:
    """Up to sixteen numbers from an address, zeros beyond ``count``."""
    if itemsize == 4:
        return memory.load(np.float32(0), address, count)
    return memory.load(np.uint16(0), address, count)


@njit(forceinline=True)
def store(address: int, x: Any, itemsize: int, count: int) -> None:
    """The first ``count`` of sixteen numbers to an address."""
    if itemsize == 4:
        memory.store(np.float32(0), address, x, count)
    else:
        memory.store(np.uint16(0), address, x, count)


@njit(forceinline=True)
def load_lanes(address: int) -> Any:
    """Sixteen fp32 numbers."""
    return memory.load(np.float32(0), address, WIDTH)


@njit(forceinline=True)
def store_lanes(address: int, x: Any) -> None:
    memory.store(np.float32(0), address, x, WIDTH)


@njit(forceinline=True)
def load_float(address: int) -> Any:
    return memory.load_scalar(np.float32(0), address)


@njit(forceinline=True)
def store_float(address: int, value: Any) -> None:
    memory.store_scalar(np.float32(0), address, value)


@njit(forceinline=True)
def load_number(address: int, itemsize: int) -> Any:
    """One number from an address."""
    if itemsize == 4:
        return memory.load_scalar(np.float32(0), address)
    return memory.load_scalar(np.uint16(0), address)


@njit(forceinline=True)
def store_number(address: int, value: Any, itemsize: int) -> None:
    """One number to an address."""
    if itemsize == 4:
        memory.store_scalar(np.float32(0), address, value)
    else:
        memory.store_scalar(np.uint16(0), address, value)
