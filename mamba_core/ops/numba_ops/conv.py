"""The causal convolution with SiLU: one task is a sequence and a few channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from mamba_core.ops.machine.compiling import compiled_callback, fingerprint
from mamba_core.ops.machine.lanes import fma, silu
from mamba_core.ops.machine.memory import prefetch, word
from mamba_core.ops.numba_ops.sized import WIDTH, load, load_lanes, store, store_lanes
from mamba_core.ops.numba_ops.team import expect, flat, matrix, matrix_names, plain, record_of, rows_of, run, take_tasks
from mamba_core.ops.numba_ops.tiles import aligned, channels_per_task, turn_in, turn_out
from mamba_core.ops.packing import Packing

# tokens that sixteen channels take before the next sixteen, which share lines with them, come up to them
_TILE = 16

_ARGUMENTS = record_of(
    (
        *("next_task", "num_tasks", "num_blocks", "block", "num_channels", "width"),
        *(*matrix_names("x"), *matrix_names("y")),
        *("weight", "bias", "state", "state_size", "slots", "bounds"),
    )
)


@njit(forceinline=True)
def _input(a: Any, token: int, begin: int, channel: int, count: int, history: int) -> Any:
    """The inputs of sixteen channels at a token, or what was kept of those before the sequence went on."""
    if token >= begin:
        return load(a.x + token * a.x_stride + channel * a.x_size, a.x_size, count)
    return load_lanes(history + 64 * (token - begin + a.width - 1))


@njit(error_model="numpy")
def _weigh(a: Any, low: int, high: int, begin: int, channel: int, count: int, taps: int, history: int) -> None:
    """Outputs of sixteen channels at the tokens from low to high."""
    bias = load(a.bias + 4 * channel, 4, count)
    for token in range(low, high):
        y = bias
        for k in range(a.width):
            value = _input(a, token + k - a.width + 1, begin, channel, count, history)
            y = fma(value, load_lanes(taps + 64 * k), y)
        store(a.y + token * a.y_stride + channel * a.y_size, silu(y), a.y_size, count)


@njit(error_model="numpy")
def _weigh_four(a: Any, low: int, high: int, begin: int, channel: int, count: int, taps: int, history: int) -> None:
    """``_weigh`` of four inputs, each of which is read once."""
    bias = load(a.bias + 4 * channel, 4, count)
    first_tap, second_tap = load_lanes(taps), load_lanes(taps + 64)
    third_tap, fourth_tap = load_lanes(taps + 128), load_lanes(taps + 192)
    first = _input(a, low - 3, begin, channel, count, history)
    second = _input(a, low - 2, begin, channel, count, history)
    third = _input(a, low - 1, begin, channel, count, history)
    for token in range(low, high):
        x = a.x + token * a.x_stride + channel * a.x_size
        prefetch(x + _TILE * a.x_stride)
        fourth = load(x, a.x_size, count)
        y = fma(second, second_tap, fma(first, first_tap, bias))
        y = fma(fourth, fourth_tap, fma(third, third_tap, y))
        store(a.y + token * a.y_stride + channel * a.y_size, silu(y), a.y_size, count)
        first, second, third = second, third, fourth


@njit(error_model="numpy")
def _conv_task(a: Any, task: int) -> None:
    """All tokens of one sequence for ``a.block`` channels."""
    row, channel = task // a.num_blocks, task % a.num_blocks * a.block
    begin, end = word(a.bounds, row), word(a.bounds, row + 1)
    if end <= begin:
        return
    num_channels, before = min(a.block, a.num_channels - channel), a.width - 1
    scratch = np.empty(a.block * 2 * a.width + WIDTH, np.float32)
    taps = aligned(scratch)
    history = taps + 4 * a.block * a.width
    own_state = a.state + a.state_size * (word(a.slots, row) * a.num_channels + channel) * before
    turn_in(a.weight + 4 * channel * a.width, 4, taps, num_channels, a.width, np.float32(1.0))
    turn_in(own_state, a.state_size, history, num_channels, before, np.float32(1.0))
    for low in range(begin, end, _TILE):
        high = min(low + _TILE, end)
        for first in range(0, num_channels, WIDTH):
            own, tap = history + 4 * first * before, taps + 4 * first * a.width
            if a.width == 4:
                _weigh_four(a, low, high, begin, channel + first, num_channels - first, tap, own)
            else:
                _weigh(a, low, high, begin, channel + first, num_channels - first, tap, own)
    _keep_tail(a, channel, num_channels, begin, end, history)
    turn_out(history, own_state, a.state_size, num_channels, before)


@njit(error_model="numpy")
def _keep_tail(a: Any, channel: int, num_channels: int, begin: int, end: int, history: int) -> None:
    """The last K-1 inputs of a sequence and its history, into the history."""
    before, length = a.width - 1, end - begin
    for first in range(0, num_channels, WIDTH):
        own = history + 4 * first * before
        for k in range(before):
            # of what is read here nothing has been overwritten: it lies further on
            if length + k < before:
                value = load_lanes(own + 64 * (length + k))
            else:
                x = a.x + (end + k - before) * a.x_stride + (channel + first) * a.x_size
                value = load(x, a.x_size, num_channels - first)
            store_lanes(own + 64 * k, value)


def _compile_tasks() -> Any:
    source = fingerprint()

    def conv_tasks(pointer: Any) -> int:
        take_tasks(pointer, _conv_task)
        return source

    return compiled_callback(types.int64(_ARGUMENTS), conv_tasks)


_conv_tasks = _compile_tasks()


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor) -> Tensor:
    """See ``mamba_core.ops.causal_conv1d_step``."""
    return causal_conv1d(x, weight, bias, state, Packing.step(slots))


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, packing: Packing) -> Tensor:
    """See ``mamba_core.ops.causal_conv1d``."""
    num_rows, (num_channels, width) = packing.num_rows, weight.shape
    expect(x=(x, (len(x), num_channels)), state=(state, (len(state), num_channels, width - 1)))
    if bias is not None:
        expect(bias=(bias, (num_channels,)))
    rows = rows_of(packing, state, x)
    if state.dtype not in (torch.float32, torch.bfloat16) or not state.is_contiguous():
        own = state[rows.slots].float().contiguous()
        y = causal_conv1d(x, weight, bias, own, replace(packing, slots=torch.arange(num_rows)))
        state[rows.slots] = own.to(state.dtype)
        return y
    y = torch.empty(x.shape, dtype=x.dtype)
    parts = [plain(x), plain(y)]
    vectors = [flat(weight), flat(weight.new_zeros(num_channels) if bias is None else bias)]
    block = channels_per_task(num_rows, num_channels)
    num_blocks = -(-num_channels // block)
    run(
        _conv_tasks,
        (
            *(num_blocks, block, num_channels, width),
            *(number for part in parts for number in matrix(part)),
            *(t.data_ptr() for t in (*vectors, state)),
            *(state.itemsize, rows.slots.data_ptr(), rows.bounds.data_ptr()),
        ),
        num_rows * num_blocks,
    )
    return y
