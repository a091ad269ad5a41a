"""The products of ``persistent_rows_kernel`` besides in_proj, and its recurrence."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from mamba_core.ops.triton.persistent import _sigmoid, _softplus, _view
from mamba_core.ops.triton.persistent_rows_parts import _inputs_of_state, _layout_of_states, _state
from mamba_core.ops.triton.persistent_rows_tiles import (
    HIGH,
    _indices_2d,
    _inputs,
    _multiply_block,
    _nothing,
    _take,
)


@gluon.jit
def _share_low(ring, at, x, shares_ptr, pid, SIZES: gl.constexpr):
    """x_proj of this program's channels x [channels, B]: its share of low [R + 2 N, B], for all to add up."""
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    ROWS: gl.constexpr = HIGH * SIZES.WIDE // SIZES.BLOCK_C
    BLOCKS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[SIZES.WARPS, 1], instr_shape=[16, 8]
    )
    for i in gl.static_range((LOW_WIDTH + ROWS - 1) // ROWS):
        acc = gl.zeros([ROWS, BLOCK_B], gl.float32, BLOCKS)
        at, acc = _multiply_block(ring, at, x, acc, ROWS, SIZES)
        row, b = _indices_2d(ROWS, BLOCK_B, BLOCKS)
        share_at = shares_ptr + pid * (LOW_WIDTH * BLOCK_B) + ((i * ROWS + row) * BLOCK_B + b)
        gl.store(share_at, acc, mask=(i * ROWS + row < LOW_WIDTH) & (b >= 0))
    return at


@gluon.jit
def _sum_low(told, own, SIZES: gl.constexpr):
    """Add up all programs' shares of elements of low, in their order: ``own`` are counted in fours."""
    first, count = own
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    BLOCK_L: gl.constexpr = SIZES.BLOCK_L
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    # four outputs a thread
    SHARES: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_L, BLOCK_L // 4], [SIZES.WARPS, 1], [1, 0])
    p, i = _indices_2d(SIZES.P_SPACE, BLOCK_L, SHARES)
    some_at = gl.multiple_of(told.shares + (p * (LOW_WIDTH * BLOCK_B) + first * 4 + i), [1, 16])
    mask = gl.max_constancy((p < SIZES.PROGRAMS) & (i < count * 4), [1, 4])
    total = gl.sum(gl.load(some_at, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    i = gl.arange(0, BLOCK_L, layout=gl.SliceLayout(0, SHARES)) + _nothing()
    index = first * 4 + i
    gl.store(told.low + index % BLOCK_B * LOW_WIDTH + index // BLOCK_B, total, mask=i < count * 4)


@gluon.jit
def _keep_gate(z, z_kept, SIZES: gl.constexpr):
    """SiLU of z, kept."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    C_SPACE: gl.constexpr = SIZES.BLOCK_C // HIGH
    z = z.to(gl.bfloat16).to(gl.float32)
    _view(z_kept, gl.float32, [BLOCK_B, C_SPACE, HIGH], FLAT).permute((1, 2, 0)).store(z * _sigmoid(z))


@gluon.jit
def _keep_low(low_ptr, low_kept, SIZES: gl.constexpr):
    """Keep dt_proj's inputs; their squares [B]."""
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    R: gl.constexpr = SIZES.R
    ROWS: gl.constexpr = HIGH * SIZES.WIDE // SIZES.BLOCK_C
    LOW: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [SIZES.WARPS, 1], [1, 0])
    power = gl.zeros([BLOCK_B], gl.float32, gl.SliceLayout(1, LOW))
    b, r = _indices_2d(BLOCK_B, ROWS, LOW)
    for i in gl.static_range((R + ROWS - 1) // ROWS):
        mask = gl.max_constancy((i * ROWS + r < R) & (b >= 0), [1, 4])
        low_at = low_ptr + (b * (R + 2 * SIZES.N) + i * ROWS + r)
        low = gl.load(low_at, mask=mask, other=0.0, cache_modifier=".cg")
        power += gl.sum(low * low, axis=1)
        low_kept.index(i).store(low.to(gl.bfloat16))
    return power


@gluon.jit
def _multiply_dt(ring, at, kept, power, inner_eps, SIZES: gl.constexpr):
    """dt_proj of the inputs that are kept, whose squares are ``power``: its sums, kept."""
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    R: gl.constexpr = SIZES.R
    ROWS: gl.constexpr = HIGH * SIZES.WIDE // BLOCK_C
    BLOCKS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[SIZES.WARPS, 1], instr_shape=[16, 8]
    )
    dt = gl.zeros([BLOCK_C, BLOCK_B], gl.float32, BLOCKS)
    for i in gl.static_range((R + ROWS - 1) // ROWS):
        low = kept.low.index(i).permute((1, 0)).load(gl.DotOperandLayout(1, BLOCKS, 8))
        at, dt = _multiply_block(ring, at, low, dt, BLOCK_C, SIZES)
    if SIZES.NORM:
        power = gl.convert_layout(power, gl.SliceLayout(0, BLOCKS))
        dt = dt / gl.sqrt(power / R + inner_eps)[None, :]
    kept.dt.store(dt)
    return at


@gluon.jit
def _advance_states(ssm, slots, h, constants, inner, kept, told, own, rows, inner_eps, SIZES: gl.constexpr):
    """The recurrence, eight rows after the other: their states moved on, and y. h and inner: the first rows', read."""
    D: gl.constexpr = SIZES.D
    N: gl.constexpr = SIZES.N
    STATE: gl.constexpr = _layout_of_states(SIZES)
    CHANNEL: gl.constexpr = gl.SliceLayout(2, STATE)
    PARTS: gl.constexpr = SIZES.BLOCK_B // 8
    first, count = own
    a, of_channels = constants
    dt_bias, skip = of_channels
    moved = ()
    for part in gl.static_range(PARTS):
        b_, c_ = inner
        if part + 1 < PARTS:
            inner = _inputs_of_state(told.low, part + 1, SIZES)
            h += (_state(ssm, slots[part + 1], own, STATE, SIZES),)
        if SIZES.NORM:
            b_ = b_ / gl.sqrt(gl.sum(b_ * b_, axis=1) / N + inner_eps)[:, None]
            c_ = c_ / gl.sqrt(gl.sum(c_ * c_, axis=1) / N + inner_eps)[:, None]
        delta = _softplus(kept.dt.permute((1, 0)).slice(part * 8, 8).load(CHANNEL) + dt_bias)
        x = kept.x.slice(part * 8, 8).load(CHANNEL).to(gl.float32)
        grown = gl.expand_dims(delta * x, 2) * gl.expand_dims(b_, 1)
        state = gl.exp2(gl.expand_dims(delta, 2) * a) * h[part].to(gl.float32) + grown
        y = gl.sum(state * gl.expand_dims(c_, 1), axis=2) + skip * x
        y = y * kept.z.slice(part * 8, 8).load(CHANNEL)
        b, d = _indices_2d(8, SIZES.BLOCK_C, CHANNEL)
        y_at = told.y + ((part * 8 + b) * D + first + d)
        gl.store(y_at, y.to(gl.bfloat16), mask=(part * 8 + b < rows) & (d < count))
        moved += (state,)
    return moved


@gluon.jit
def _multiply_out(ring, at, y_ptr, rows, sums, SIZES: gl.constexpr):
    """out_proj of y [rows, D], its columns as they come: sums [tiles, WARPS, 16, B]."""
    WIDE: gl.constexpr = SIZES.WIDE
    D: gl.constexpr = SIZES.D
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    WARPS: gl.constexpr = SIZES.WARPS
    O_TILES: gl.constexpr = SIZES.O_TILES
    DEPTH: gl.constexpr = SIZES.DEPTH
    O_GROUP: gl.constexpr = SIZES.O_GROUP
    TILES: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    pieces = ()
    for j in gl.static_range(DEPTH if DEPTH < D // WIDE else D // WIDE):
        pieces += (_inputs(y_ptr, j * WIDE, rows, WIDE, D, BLOCK_B, WARPS),)
    accs = ()
    for _ in gl.static_range(O_TILES):
        accs += (gl.zeros([WARPS, HIGH, BLOCK_B], gl.float32, TILES),)
    for first in gl.static_range(0, D // WIDE, O_GROUP):
        for j in gl.static_range(first + DEPTH, first + DEPTH + O_GROUP):
            if j < D // WIDE:
                pieces += (_inputs(y_ptr, j * WIDE, rows, WIDE, D, BLOCK_B, WARPS),)
        at, w = _take(ring, at, O_TILES * (O_GROUP if first + O_GROUP <= D // WIDE else D // WIDE - first), SIZES)
        for j in gl.static_range(O_GROUP):
            if first + j < D // WIDE:
                news = ()
                for t in gl.static_range(O_TILES):
                    news += (mma_v2(w[j * O_TILES + t], pieces[first + j], accs[t]),)
                accs = news
    for t in gl.static_range(O_TILES):
        sums.index(t).store(accs[t])
    return at
