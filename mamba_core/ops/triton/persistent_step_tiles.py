"""The ring of tiles of ``persistent_step_kernel``: how weights get into it, and how they are multiplied."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mamba_core.ops.triton.persistent import (
    FIELDS,
    IN_PROJ,
    OUT_PROJ,
    X_PROJ,
    _barrier,
    _copy,
    _next,
    _share,
    _view,
)

# four weights in int8 to fp32: a byte with its sign turned over is the end of a number from 2^23 on, which ends in 128
# more; the instruction that converts is too slow for the rate at which weights come
_WIDEN = gl.constexpr("""
{
    .reg .b32 bytes;
    xor.b32 bytes, $4, 0x80808080;
    prmt.b32 $0, bytes, 0x4B000000, 0x7440;
    prmt.b32 $1, bytes, 0x4B000000, 0x7441;
    prmt.b32 $2, bytes, 0x4B000000, 0x7442;
    prmt.b32 $3, bytes, 0x4B000000, 0x7443;
}
""")


class Sizes(NamedTuple):
    """What the kernel is compiled for.

    H, D, R, N and K of a layer; R_HIGH and R_LOW, powers of two, hold R, and BLOCK_N holds N. Of PROGRAMS programs the
    one with most has room for BLOCK_C channels, BLOCK_O outputs of out_proj and BLOCK_P of x_proj: X_STAGES stages of
    in_proj's half, Z_STAGES of which come before x_proj in the second, P_STAGES of x_proj and O_STAGES of out_proj. A
    stage has PARTS parts of rows, 256 columns each, for WARPS warps that multiply. The ring holds STAGES of them, which
    COPIERS warps copy, AHEAD and one more at a time. WEIGHT_DTYPE of the three large products: bfloat16, or int8 with
    scales.
    """

    H: int
    D: int
    R: int
    N: int
    K: int
    R_HIGH: int
    R_LOW: int
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_O: int
    BLOCK_P: int
    X_STAGES: int
    Z_STAGES: int
    P_STAGES: int
    O_STAGES: int
    PROGRAMS: int
    PARTS: int
    STAGES: int
    WARPS: int
    COPIERS: int
    AHEAD: int
    WEIGHT_DTYPE: Any = gl.bfloat16
    SKIP_DTYPE: Any = gl.float32
    HAS_BIAS: bool = False
    HAS_CONV_BIAS: bool = True
    TAP_MAJOR: bool = True
    NORM: bool = False


@gluon.jit
def _widen(tile):
    """Weights in fp32."""
    if tile.dtype == gl.int8:
        return (
            gl.inline_asm_elementwise(_WIDEN, "=f,=f,=f,=f,r", [tile], dtype=gl.float32, is_pure=True, pack=4)
            - 8388736.0
        )
    else:  # noqa: RET505  what is not there must not be compiled
        return tile.to(gl.float32)


@gluon.jit
def _products(entry):
    """Where the weights of the three large products of a layer are."""
    return gl.load(entry + IN_PROJ), gl.load(entry + X_PROJ), gl.load(entry + OUT_PROJ)


@gluon.jit
def _put(
    ring,
    at,
    w_at,
    first_row,
    num_rows,
    begin,
    end,
    WIDTH: gl.constexpr,
    SHARES: gl.constexpr,
    SIZES: gl.constexpr,
):
    """Copy stages ``begin`` to ``end`` of rows of W [*, WIDTH] into the next slots of the ring, as they get free."""
    tiles, filled, freed = ring
    PARTS: gl.constexpr = SIZES.PARTS
    AHEAD: gl.constexpr = SIZES.AHEAD
    DTYPE: gl.constexpr = tiles[0].dtype
    # 16 bytes
    EACH: gl.constexpr = 128 // DTYPE.primitive_bitwidth
    COPY: gl.constexpr = gl.BlockedLayout([1, EACH], [EACH // 8, 256 // EACH], [SIZES.COPIERS, 1], [1, 0])
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, COPY))[:, None]
    column = gl.arange(0, 256, layout=gl.SliceLayout(0, COPY))[None, :]
    w_ptr = w_at.to(gl.pointer_type(DTYPE)) + first_row.to(gl.int64) * WIDTH
    for stage in range(begin, end):
        slot, turn = at
        row = stage * (PARTS // SHARES) + part // SHARES
        mask = gl.max_constancy((row < num_rows) & (column >= 0), [1, 256])
        offset = row * WIDTH + part % SHARES * 256 + column
        mbarrier.wait(freed.index(slot), turn ^ 1)
        for j in gl.static_range(WIDTH // (SHARES * 256)):
            pointers = gl.multiple_of(w_ptr + (offset + j * SHARES * 256), [1, 16])
            _copy(tiles[j].index(slot), pointers, mask=mask)
        async_copy.mbarrier_arrive(filled.index(slot), increment_count=False)
        async_copy.commit_group()
        # more on its way than keeps memory busy would only stand before the loads that others wait for
        async_copy.wait_group(AHEAD)
        at = _next(at, SIZES.STAGES)
    return at


@gluon.jit
def _copy_weights(ring, table_ptr, layers, SIZES: gl.constexpr):
    """What the warps do that copy: all stages of the step, in the order in which they are used."""
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    X_STAGES: gl.constexpr = SIZES.X_STAGES
    Z_STAGES: gl.constexpr = SIZES.Z_STAGES
    PROGRAMS: gl.constexpr = SIZES.PROGRAMS
    first_c, count_c = _share(D, PROGRAMS)
    first_p, count_p = _share(LOW_WIDTH, PROGRAMS)
    first_o, count_o = _share(H, PROGRAMS)
    at = (first_c * 0, first_c * 0)
    in_next, p_next, out_next = _products(table_ptr)
    for layer in range(layers):
        in_at, p_at, out_at = in_next, p_next, out_next
        in_next, p_next, out_next = _products(table_ptr + gl.minimum(layer + 1, layers - 1) * FIELDS)
        at = _put(ring, at, in_at, first_c, count_c, 0, X_STAGES, H, 2, SIZES)
        at = _put(ring, at, in_at, D + first_c, count_c, 0, Z_STAGES, H, 2, SIZES)
        at = _put(ring, at, p_at, first_p, count_p, 0, SIZES.P_STAGES, D, 4, SIZES)
        at = _put(ring, at, in_at, D + first_c, count_c, Z_STAGES, X_STAGES, H, 2, SIZES)
        at = _put(ring, at, out_at, first_o, count_o, 0, SIZES.O_STAGES, D, 4, SIZES)
    async_copy.wait_group(0)


@gluon.jit
def _multiply(ring, at, x, sums, begin, end, SHARES: gl.constexpr, SIZES: gl.constexpr):
    """The rows of the next stages times x, each in SHARES shares: sums [stages, rows, SHARES], ``begin`` to ``end``."""
    tiles, filled, freed = ring
    STAGES: gl.constexpr = SIZES.STAGES
    ROWS: gl.constexpr = SIZES.PARTS // SHARES
    TILE: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 1, 32], [SIZES.WARPS // SHARES, SHARES, 1], [2, 1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    for stage in range(begin, end):
        slot, turn = at
        mbarrier.wait(filled.index(slot), turn)
        acc = gl.zeros([ROWS, SHARES, 256], gl.float32, TILE)
        for j in gl.static_range(SIZES.H // 512):
            tile = _view(tiles[j], tiles[j].dtype, [STAGES, ROWS, SHARES, 256], SHARED).index(slot)
            acc += _widen(tile.load(TILE)) * x[j][None, :, :]
        # the slot is free once every thread has read it
        _barrier()
        mbarrier.arrive(freed.index(slot))
        sums.index(stage).store(gl.sum(acc, axis=2))
        at = _next(at, STAGES)
    return at


@gluon.jit
def _inputs(x_ptr, SHARES: gl.constexpr, SIZES: gl.constexpr):
    """What all rows of a product are multiplied with: pieces [SHARES, 256] in the layout of the tiles."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 1, 32], [SIZES.WARPS // SHARES, SHARES, 1], [2, 1, 0])
    PIECE: gl.constexpr = gl.SliceLayout(0, TILE)
    share = gl.arange(0, SHARES, layout=gl.SliceLayout(1, PIECE))[:, None]
    column = gl.arange(0, 256, layout=gl.SliceLayout(0, PIECE))[None, :]
    x = ()
    for j in gl.static_range(SIZES.H // 512):
        x += (gl.load(x_ptr + (j * SHARES + share) * 256 + column, cache_modifier=".cg").to(gl.float32),)
    return x


@gluon.jit
def _total(sums, rows: gl.constexpr, SHARES: gl.constexpr, LAYOUT: gl.constexpr):
    """The sums of a phase, [rows]."""
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return gl.sum(_view(sums, gl.float32, [rows, SHARES], SHARED).load(LAYOUT), axis=1)
