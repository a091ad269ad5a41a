"""The products of ``persistent_rows_kernel`` whose sums go to memory, and out_proj."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

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
def _sum_low(shares_ptr, low_ptr, first, count, SIZES: gl.constexpr):
    """Add up all programs' shares of elements of low, in their order: ``count`` times four from the first four on."""
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    BLOCK_L: gl.constexpr = SIZES.BLOCK_L
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    # four outputs a thread
    SHARES: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_L, BLOCK_L // 4], [SIZES.WARPS, 1], [1, 0])
    p, i = _indices_2d(SIZES.P_SPACE, BLOCK_L, SHARES)
    some_at = gl.multiple_of(shares_ptr + (p * (LOW_WIDTH * BLOCK_B) + first * 4 + i), [1, 16])
    mask = gl.max_constancy((p < SIZES.PROGRAMS) & (i < count * 4), [1, 4])
    total = gl.sum(gl.load(some_at, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    i = gl.arange(0, BLOCK_L, layout=gl.SliceLayout(0, SHARES)) + _nothing()
    index = first * 4 + i
    gl.store(low_ptr + index % BLOCK_B * LOW_WIDTH + index // BLOCK_B, total, mask=i < count * 4)


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
