"""The selective scan: one task is a sequence and a few channels, whose states stay in the first cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from mamba_core.ops.machine.compiling import compiled_callback, fingerprint
from mamba_core.ops.machine.lanes import exp2, fma, silu, softplus, splat
from mamba_core.ops.machine.memory import prefetch, word
from mamba_core.ops.numba_ops.sized import WIDTH, load, load_float, load_lanes, store, store_lanes
from mamba_core.ops.numba_ops.team import expect, flat, matrix, matrix_names, plain, record_of, rows_of, run, take_tasks
from mamba_core.ops.numba_ops.tiles import aligned, channels_per_task, turn_in, turn_out
from mamba_core.ops.packing import Packing

_LOG2_E = np.float32(1.4426950408889634)
# tokens between a line's being asked for and its use
_AHEAD = 6

_ARGUMENTS = record_of(
    (
        *("next_task", "num_tasks", "num_blocks", "block", "num_channels", "num_states"),
        *(name for matrix in ("x", "dt", "z", "B", "C", "y") for name in matrix_names(matrix)),
        *("A", "D", "bias", "state", "slots", "bounds"),
    )
)


@njit(error_model="numpy")
def _scan_task(a: Any, task: int) -> None:
    """All tokens of one sequence for ``a.block`` channels."""
    row, channel = task // a.num_blocks, task % a.num_blocks * a.block
    begin, end = word(a.bounds, row), word(a.bounds, row + 1)
    if end <= begin:
        return
    num_states, num_channels = a.num_states, min(a.block, a.num_channels - channel)
    padded = (num_states + WIDTH - 1) // WIDTH * WIDTH
    turned = a.block * num_states
    scratch = np.empty(2 * turned + 2 * padded + WIDTH, np.float32)
    rates = aligned(scratch)
    states, b, c = rates + 4 * turned, rates + 8 * turned, rates + 8 * turned + 4 * padded
    own_state = a.state + 4 * (word(a.slots, row) * a.num_channels + channel) * num_states
    turn_in(a.A + 4 * channel * num_states, 4, rates, num_channels, num_states, _LOG2_E)
    turn_in(own_state, 4, states, num_channels, num_states, np.float32(1.0))
    for token in range(begin, end):
        for first in range(0, num_states, WIDTH):
            b_address, c_address = a.B + token * a.B_stride, a.C + token * a.C_stride
            store_lanes(b + 4 * first, load(b_address + first * a.B_size, a.B_size, num_states - first))
            store_lanes(c + 4 * first, load(c_address + first * a.C_size, a.C_size, num_states - first))
        for first in range(0, num_channels, WIDTH):
            here, count = channel + first, num_channels - first
            x_address = a.x + token * a.x_stride + here * a.x_size
            dt_address = a.dt + token * a.dt_stride + here * a.dt_size
            z_address = a.z + token * a.z_stride + here * a.z_size
            prefetch(x_address + _AHEAD * a.x_stride)
            prefetch(dt_address + _AHEAD * a.dt_stride)
            prefetch(z_address + _AHEAD * a.z_stride)
            x = load(x_address, a.x_size, count)
            delta = softplus(load(dt_address, a.dt_size, count) + load(a.bias + 4 * here, 4, count))
            gain = delta * x
            y = load(a.D + 4 * here, 4, count) * x
            rate, own = rates + 4 * first * num_states, states + 4 * first * num_states
            for state in range(num_states):
                decay = exp2(delta * load_lanes(rate + 64 * state))
                h = fma(decay, load_lanes(own + 64 * state), gain * splat(load_float(b + 4 * state)))
                store_lanes(own + 64 * state, h)
                y = fma(h, splat(load_float(c + 4 * state)), y)
            y = y * silu(load(z_address, a.z_size, count))
            store(a.y + token * a.y_stride + here * a.y_size, y, a.y_size, count)
    turn_out(states, own_state, 4, num_channels, num_states)


def _compile_tasks() -> Any:
    source = fingerprint()

    def scan_tasks(pointer: Any) -> int:
        take_tasks(pointer, _scan_task)
        return source

    return compiled_callback(types.int64(_ARGUMENTS), scan_tasks)


_scan_tasks = _compile_tasks()


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """See ``mamba_core.ops.selective_scan_step``."""
    return selective_scan(x, dt, A, B, C, D, z, dt_bias, state, Packing.step(slots))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    packing: Packing,
) -> Tensor:
    """See ``mamba_core.ops.selective_scan``."""
    per_channel, per_token, per_state = A.shape[:1], x.shape, (len(x), A.shape[1])
    expect(x=(x, (len(x), *per_channel)), dt=(dt, per_token), z=(z, per_token), B=(B, per_state), C=(C, per_state))
    expect(D=(D, per_channel), dt_bias=(dt_bias, per_channel), state=(state, (len(state), *A.shape)))
    rows = rows_of(packing, state, x)
    if state.dtype != torch.float32 or not state.is_contiguous():
        # the calls' own states are taken out and put back
        own = state[rows.slots].float().contiguous()
        packing = replace(packing, slots=torch.arange(packing.num_rows))
        y = selective_scan(x, dt, A, B, C, D, z, dt_bias, own, packing)
        state[rows.slots] = own.to(state.dtype)
        return y
    num_rows, (num_channels, num_states) = packing.num_rows, A.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    parts = [plain(t) for t in (x, dt, z, B, C, y)]
    vectors = [flat(t) for t in (A, D, dt_bias)]
    block = channels_per_task(num_rows, num_channels)
    num_blocks = -(-num_channels // block)
    run(
        _scan_tasks,
        (
            *(num_blocks, block, num_channels, num_states),
            *(number for part in parts for number in matrix(part)),
            *(t.data_ptr() for t in (*vectors, state, rows.slots, rows.bounds)),
        ),
        num_rows * num_blocks,
    )
    return y
