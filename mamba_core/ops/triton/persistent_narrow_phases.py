"""What ``persistent_narrow_kernel`` does otherwise than ``persistent_wide_kernel``: dt_proj and recurrence."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mamba_core.ops.triton.persistent import _barrier
from mamba_core.ops.triton.persistent_narrow_tiles import LOW_HIGH, LOW_ROWS
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d, _nothing
from mamba_core.ops.triton.persistent_wide_parts import PART, _moved
from mamba_core.ops.triton.persistent_wide_tiles import DEEP, ROWS


class Told(NamedTuple):
    """Where programs tell each other what they have made: pointers to the rooms that the kernel is given."""

    low: Any
    dt: Any
    y: Any
    gained: Any
    squares: Any


class Kept(NamedTuple):
    """What a program keeps of a layer in shared memory."""

    x: Any
    gates: Any
    deltas: Any
    shares: Any
    inner: Any
    y: Any


@gluon.jit
def _tell_x(x, x_ptr, own, rows, D: gl.constexpr):
    """Write x of this program's channels."""
    LAYOUT: gl.constexpr = x.type.layout
    b, c = _indices_2d(ROWS, x.type.shape[1], LAYOUT)
    gl.store(x_ptr + (b * D + own.channel + c), x, mask=(b < rows) & (c >= 0))


@gluon.jit
def _tell_low(low, told, row, output, rows, SIZES: gl.constexpr):
    """Write this program's part of x_proj [LOW_HIGH, LOW_ROWS], of which ``rows`` are there."""
    LAYOUT: gl.constexpr = low.type.layout
    o, b = _indices_2d(LOW_HIGH, LOW_ROWS, LAYOUT)
    low_at, mask = (row + b) * (SIZES.R + 2 * SIZES.N) + output + o, (b < rows) & (o >= 0)
    gl.store(told.low + low_at, low, mask=mask)
    gl.store(told.dt + low_at, low.to(gl.bfloat16), mask=mask)


@gluon.jit
def _multiply_dt(ring, use, x_tiles, told, inner_kept, SIZES: gl.constexpr):
    """dt_proj's sums for this program's channels, the ring's first slot; B and C of all rows are kept."""
    R: gl.constexpr = SIZES.R
    N: gl.constexpr = SIZES.N
    A: gl.constexpr = SIZES.A
    LOW_WIDTH: gl.constexpr = R + 2 * N
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, A // 2, 16])
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    INNER: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    w_tiles, _, filled, freed = ring
    b, r = _indices_2d(ROWS, DEEP, WHOLE)
    mask = gl.max_constancy((r < R) & (b < SIZES.SPACE), [1, 8])
    dt_at = gl.multiple_of(told.dt + (b * LOW_WIDTH + r), [1, 16])
    low = gl.load(dt_at, mask=mask, other=0.0, cache_modifier=".cg")
    b, n = _indices_2d(ROWS, 2 * N, INNER)
    inner_at = gl.multiple_of(told.low + (b * LOW_WIDTH + R + n), [1, 16])
    mask = gl.max_constancy((b < SIZES.SPACE) & (n >= 0), [1, 4])
    inner = gl.load(inner_at, mask=mask, other=0.0, cache_modifier=".cg")
    # where inputs were and will be
    x_tiles.index(0 + _nothing()).store(low)
    inner_kept.store(inner)
    fence_async_shared()
    _barrier()
    mbarrier.wait(filled.index(0), use & 1)
    nothing = _nothing()
    dt = gl.zeros([ROWS, A], gl.float32, MMA)
    dt = warpgroup_mma(x_tiles.index(nothing), w_tiles.index(nothing).permute((1, 0)), dt, is_async=True)
    dt = warpgroup_mma_wait(0, deps=(dt,))
    _barrier()
    mbarrier.arrive(freed.index(0))
    return dt


@gluon.jit
def _advance_states(h, constants, kept, y_ptr, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """The recurrence: the states of all rows moved on, PART rows after the other, and y."""
    N: gl.constexpr = SIZES.N
    CHANNEL: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    INNER: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    OWN_Y: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [8, 1], [1, 0])
    states = ()
    for part in gl.static_range(SIZES.SPACE // PART):
        inner = kept.inner.slice(part * PART, PART)
        now = inner.slice(0, N, dim=1).load(INNER), inner.slice(N, N, dim=1).load(INNER)
        delta = kept.deltas.slice(part * PART, PART).load(CHANNEL)
        x = kept.x.slice(part * PART, PART).load(CHANNEL)
        gate = kept.gates.slice(part * PART, PART).load(CHANNEL)
        moved, y = _moved(h[part], constants, now, delta, x, gate)
        kept.y.slice(part * PART, PART).store(y.to(gl.bfloat16))
        states += (moved,)
    b, d = _indices_2d(SIZES.SPACE, SIZES.A // 2, OWN_Y)
    y_at = gl.multiple_of(y_ptr + (b * SIZES.D + own.channel + d), [1, 16])
    mask = gl.max_constancy((b < rows) & (d >= 0), [1, 8])
    gl.store(y_at, kept.y.slice(0, SIZES.SPACE).load(OWN_Y), mask=mask)
    return states
