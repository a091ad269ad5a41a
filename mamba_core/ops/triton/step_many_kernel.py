"""The recurrence of a decode step of many rows: each warp stays with 32 channels and goes through rows.

What it multiplies with is read once; the states of a row are on their way to shared memory while those of the row
before are moved on. Four lanes share a channel, so that states are read and written in whole lines, and each of them
computes what concerns a channel alone for one of the four channels that they have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mamba_core.ops import lag
from mamba_core.ops.triton.math import LOG2_E
from mamba_core.ops.triton.persistent import _copy, _sigmoid, _softplus

# channels of a program, and states of a channel
CHANNELS = gl.constexpr(32)
STATES = gl.constexpr(16)
# rows whose states are on their way or in use: more than two were slower
STAGES = gl.constexpr(2)
BEHIND = gl.constexpr(lag.BEHIND)
WRITTEN = gl.constexpr(lag.WRITTEN)
# eight channels beside each other, and what four lanes hold of one
TILE = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0]))
# a channel a lane: one of those whose states the lane holds
LANES = gl.constexpr(gl.DistributedLinearLayout([], [[8], [16], [1], [2], [4]], [], [], [32]))
ROW_A_LANE = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


class Inputs(NamedTuple):
    """Pointers to what comes from the kernels before: see ``advance_many_kernel``."""

    xz: Any
    low: Any
    delta: Any


class Home(NamedTuple):
    """Pointers to what is kept from step to step, and how far the states of two slots lie apart."""

    state: Any
    slots: Any
    phases: Any
    kept: Any
    kept_b: Any
    stride: Any


class Row(NamedTuple):
    """All of a row but its states: slot and phase, x, z, delta before its bias, B, C, and the token that was kept."""

    slot: Any
    phase: Any
    x: Any
    z: Any
    raw: Any
    b: Any
    c: Any
    kept_x: Any
    kept_raw: Any
    kept_b: Any


@gluon.jit
def _one_of(values, index):
    """What the lane of this number holds."""
    lane = gl.arange(0, 32, layout=ROW_A_LANE)
    return gl.sum(gl.where(lane == index, values, 0), axis=0)


@gluon.jit
def _own_slots(home, first, end, LAGS: gl.constexpr):
    """Slots of this program's rows, a row a lane, and slots with phases: read row by row, they would be waited for."""
    lane = gl.arange(0, 32, layout=ROW_A_LANE)
    mask = first + lane < end
    slots = gl.load(home.slots + first + lane, mask=mask, other=0).to(gl.int32)
    told = slots * 4
    if LAGS:
        told += gl.load(home.phases + slots, mask=mask, other=0)
    return slots, told


@gluon.jit
def _states_at(home, slot, d0):
    """Where the states of this program's channels are in a slot."""
    d = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, TILE))[:, None]
    n = gl.arange(0, STATES, layout=gl.SliceLayout(0, TILE))[None, :]
    return home.state + slot * home.stride + d0 * STATES + (d * STATES + n)


@gluon.jit
def _copy_states(room, home, slot, d0, mask):
    _copy(room, _states_at(home, slot, d0), mask=mask)
    async_copy.commit_group()


@gluon.jit
def _fetch(inputs, home, row, told, index, d0, dim, mask, R: gl.constexpr, LAGS: gl.constexpr):
    one = _one_of(told, index)
    slot, phase = one >> 2, one & 3
    c = d0 + gl.arange(0, CHANNELS, layout=LANES)
    n = gl.arange(0, STATES, layout=gl.SliceLayout(0, TILE))
    at = inputs.xz + row * (2 * dim)
    x = gl.load(at + c, mask=mask)
    z = gl.load(at + dim + c, mask=mask)
    raw = gl.load(inputs.delta + row * dim + c, mask=mask)
    at = inputs.low + row * (R + 2 * STATES) + R
    b = gl.load(at + n, mask=mask)
    cc = gl.load(at + STATES + n, mask=mask)
    kept_x, kept_raw, kept_b = x, raw, n
    if LAGS:
        is_behind = mask & (phase == BEHIND)
        kept = home.kept + slot * 2 * dim
        kept_x = gl.load(kept + c, mask=is_behind)
        kept_raw = gl.load(kept + dim + c, mask=is_behind)
        kept_b = gl.load(home.kept_b + slot * STATES + n, mask=is_behind)
    return Row(slot, phase, x, z, raw, b, cc, kept_x, kept_raw, kept_b)


@gluon.jit
def _spread(v):
    """Of each lane's channel, to those that hold its states: [32, 1]."""
    return gl.expand_dims(gl.convert_layout(v, gl.SliceLayout(1, TILE)), 1)


@gluon.jit
def _move(h, a, delta, x, b):
    """States one token on, by the operations of ``step_lag_kernels.move``."""
    return gl.fma(gl.exp2(_spread(delta) * a), h, _spread(delta * x) * gl.expand_dims(b, 0))


@gluon.jit
def _keep_token(home, row, b, d0, dim):
    """Instead of the states; each program its channels, the first one B."""
    c = d0 + gl.arange(0, CHANNELS, layout=LANES)
    kept = home.kept + row.slot * 2 * dim
    gl.store(kept + c, row.x)
    gl.store(kept + dim + c, row.raw)
    if d0 == 0:
        gl.store(home.kept_b + row.slot * STATES + gl.arange(0, STATES, layout=gl.SliceLayout(0, TILE)), b)


@gluon.jit(do_not_specialize=["num_rows", "own_rows"])
def advance_many_kernel(
    xz_ptr,
    low_ptr,
    delta_ptr,
    bias_ptr,
    a_ptr,
    d_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    phases_ptr,
    kept_ptr,
    kept_b_ptr,
    num_rows,
    own_rows,
    dim,
    state_stride,
    R: gl.constexpr,
    LAGS: gl.constexpr,
    PDL: gl.constexpr,
):
    """32 channels of ``own_rows`` rows, 32 at most: y [B, D] from xz [B, 2 D], low [B, R + 2 N] and delta [B, D] before
    its bias.

    With LAGS, of some rows the token is kept and their states are not written, see ``step_lag_kernels``.
    """
    if PDL:
        gdc_launch_dependents()
    inputs = Inputs(xz_ptr, low_ptr, delta_ptr)
    home = Home(state_ptr, slots_ptr, phases_ptr, kept_ptr, kept_b_ptr, state_stride.to(gl.int64))
    d0 = gl.program_id(0) * CHANNELS
    first = gl.program_id(1) * own_rows
    end = gl.minimum(first + own_rows, num_rows)
    c = d0 + gl.arange(0, CHANNELS, layout=LANES)
    d = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, TILE))[:, None]
    n = gl.arange(0, STATES, layout=gl.SliceLayout(0, TILE))[None, :]
    slots, told = _own_slots(home, first, end, LAGS)
    room = gl.allocate_shared_memory(gl.float32, [STAGES, CHANNELS, STATES], PLAIN)
    _copy_states(room.index(0), home, _one_of(slots, 0), d0, first < end)
    a = gl.load(a_ptr + d0 * STATES + (d * STATES + n)) * LOG2_E
    bias = gl.load(bias_ptr + c).to(gl.float32)
    skip = gl.load(d_ptr + c).to(gl.float32)
    if PDL:
        gdc_wait()
    row = _fetch(inputs, home, first, told, 0, d0, dim, True, R, LAGS)
    for i in range(first, end):
        index = i - first
        has_next = i + 1 < end
        following = _fetch(inputs, home, i + 1, told, index + 1, d0, dim, has_next, R, LAGS)
        _copy_states(room.index((index + 1) % STAGES), home, following.slot, d0, has_next)
        async_copy.wait_group(STAGES - 1)
        h = room.index(index % STAGES).load(TILE)
        if LAGS:  # noqa: SIM102  what is not there must not be compiled
            if row.phase == BEHIND:
                kept_delta = _softplus(row.kept_raw.to(gl.float32) + bias)
                h = _move(h, a, kept_delta, row.kept_x.to(gl.float32), row.kept_b)
        x = row.x.to(gl.float32)
        z = row.z.to(gl.float32)
        b = row.b.to(gl.float32)
        h = _move(h, a, _softplus(row.raw.to(gl.float32) + bias), x, b)
        y = gl.sum(h * gl.expand_dims(row.c.to(gl.float32), 0), axis=1)
        y = (gl.convert_layout(y, LANES) + skip * x) * (z * _sigmoid(z))
        gl.store(y_ptr + i * dim + c, y.to(y_ptr.dtype.element_ty))
        if LAGS:
            if (row.phase == WRITTEN) | ((row.phase == 0) & (row.slot % 2 == 0)):
                _keep_token(home, row, b, d0, dim)
            else:
                gl.store(_states_at(home, row.slot, d0), h)
        else:
            gl.store(_states_at(home, row.slot, d0), h)
        row = following
