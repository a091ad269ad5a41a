"""Channels side by side, sixteen at a time, for kernels whose parameters and states lie channel after channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from mamba_core.ops.numba_ops.sized import WIDTH, load_number, store_float, store_number

_LINE = 64
# channels of a task: a line of bf16 and more, few enough for a task's states to stay in the first cache
_MOST_CHANNELS, _LEAST_CHANNELS = 64, 16
_TASKS_PER_THREAD = 4


def channels_per_task(num_rows: int, num_channels: int) -> int:
    """Fewer where there would be too few tasks for the threads."""
    wanted, size = _TASKS_PER_THREAD * torch.get_num_threads(), _MOST_CHANNELS
    while size > _LEAST_CHANNELS and num_rows * -(-num_channels // size) < wanted:
        size //= 2
    return size


@njit(forceinline=True)
def aligned(scratch: Any) -> int:
    """The first address in ``scratch`` that begins a cache line; up to fifteen numbers are lost."""
    return (scratch.ctypes.data + _LINE - 1) // _LINE * _LINE


@njit(error_model="numpy")
def turn_in(source: int, itemsize: int, target: int, num_channels: int, width: int, factor: float) -> None:
    """[D, width] at ``source`` to fp32 [D / 16, width, 16] at ``target``, times a factor; zeros beyond the channels."""
    for group in range((num_channels + WIDTH - 1) // WIDTH):
        for column in range(width):
            for lane in range(WIDTH):
                channel = group * WIDTH + lane
                value = np.float32(0.0)
                if channel < num_channels:
                    value = load_number(source + itemsize * (channel * width + column), itemsize) * factor
                store_float(target + 4 * ((group * width + column) * WIDTH + lane), value)


@njit(error_model="numpy")
def turn_out(source: int, target: int, itemsize: int, num_channels: int, width: int) -> None:
    """What ``turn_in`` made, back."""
    for channel in range(num_channels):
        group, lane = channel // WIDTH, channel % WIDTH
        for column in range(width):
            value = load_number(source + 4 * ((group * width + column) * WIDTH + lane), 4)
            store_number(target + itemsize * (channel * width + column), value, itemsize)
