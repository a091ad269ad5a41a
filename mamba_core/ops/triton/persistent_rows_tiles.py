"""The ring of tiles of ``persistent_rows_kernel``: how weights get into it, and how they are multiplied."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mamba_core.ops.triton.persistent import (
    DT_PROJ,
    FIELDS,
    IN_PROJ,
    OUT_PROJ,
    X_PROJ,
    _barrier,
    _bf16,
    _copy,
    _next,
    _share,
    _view,
)

# rows of a tile
HIGH = gl.constexpr(16)


class Sizes(NamedTuple):
    """What the kernel is compiled for.

    H, D, R, N and K of a layer; BLOCK_N holds N. A group of PROGRAMS programs has BLOCK_B rows, and there are GROUPS of
    them. A program has BLOCK_C channels at the most in C_TILES tiles, of which Z_TILES of the gate's come before it
    waits; O_TILES tiles of O_ROWS outputs, for which there is room for O_SPACE; and sums BLOCK_L elements of low over
    P_SPACE programs. Tiles are WIDE columns wide, for WARPS warps that multiply. The ring holds STAGES of them, which
    COPIERS warps copy, AHEAD and one more at a time, OUT_AHEAD and one more of out_proj's. S_WARPS warps lie along the
    channels of the states. Of out_proj's inputs DEPTH pieces are on their way, and GROUP tiles are taken from the ring
    at once, O_GROUP of out_proj's.
    """

    WIDE: int
    H: int
    D: int
    R: int
    N: int
    K: int
    BLOCK_B: int
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_L: int
    P_SPACE: int
    C_TILES: int
    Z_TILES: int
    O_TILES: int
    O_ROWS: int
    O_SPACE: int
    PROGRAMS: int
    GROUPS: int
    STAGES: int
    WARPS: int
    COPIERS: int
    AHEAD: int
    OUT_AHEAD: int
    S_WARPS: int
    DEPTH: int
    GROUP: int
    O_GROUP: int
    SKIP_DTYPE: Any = gl.float32
    HAS_BIAS: bool = False
    HAS_CONV_BIAS: bool = True
    TAP_MAJOR: bool = True
    NORM: bool = False


@gluon.jit
def _nothing():
    """Zero, which the compiler does not know: what is reckoned from it is not kept in registers from layer to layer."""
    # what it does know keeps wide accesses wide
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1) * 64


@gluon.jit
def _indices_2d(A: gl.constexpr, B: gl.constexpr, LAYOUT: gl.constexpr):
    """Of the elements of a tensor [A, B]: [A, 1] and [1, B]."""
    nothing = _nothing()
    i = gl.arange(0, A, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    j = gl.arange(0, B, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    return i + nothing, j + nothing


@gluon.jit
def _indices_3d(A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr):
    """Of the elements of a tensor [A, B, C]: [A, 1, 1], [1, B, 1] and [1, 1, C]."""
    nothing = _nothing()
    i = gl.arange(0, A, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    j = gl.arange(0, B, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    k = gl.arange(0, C, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return i + nothing, j + nothing, k + nothing


@gluon.jit
def _own_channels(SIZES: gl.constexpr):
    """The first of this program's channels, and how many: whole 16 bytes of a row of x_proj."""
    EIGHTS: gl.constexpr = SIZES.D // 8
    PROGRAMS: gl.constexpr = SIZES.PROGRAMS
    first, count = _share(EIGHTS, PROGRAMS)
    return first * 8, count * 8


@gluon.jit
def _filled(ring, at, AHEAD: gl.constexpr, SIZES: gl.constexpr):
    """Tell of the copies just begun, and let no more than AHEAD such groups be on their way."""
    _, filled, _ = ring
    slot, _ = at
    async_copy.mbarrier_arrive(filled.index(slot), increment_count=False)
    async_copy.commit_group()
    async_copy.wait_group(AHEAD)
    return _next(at, SIZES.STAGES)


@gluon.jit
def _put(
    ring,
    at,
    w_at,
    first_row,
    num_rows,
    column,
    WIDTH: gl.constexpr,
    AHEAD: gl.constexpr,
    SIZES: gl.constexpr,
):
    """Copy num_rows rows, 16 at most, of WIDE columns of W [*, WIDTH] into the next slot, once that is free."""
    tiles, _, freed = ring
    slot, turn = at
    WARPS: gl.constexpr = SIZES.WARPS
    OWN: gl.constexpr = SIZES.WIDE // WARPS
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 8], [64 // OWN, 4, OWN // 8], [1, SIZES.COPIERS, 1], [2, 1, 0])
    share, row, own = _indices_3d(WARPS, HIGH, OWN, COPY)
    mask = gl.max_constancy((row < num_rows) & (share + own >= 0), [1, 1, OWN])
    w_ptr = _bf16(w_at) + first_row.to(gl.int64) * WIDTH + column
    pointers = gl.multiple_of(w_ptr + (row * WIDTH + share * OWN + own), [1, 1, 16])
    mbarrier.wait(freed.index(slot), turn ^ 1)
    _copy(tiles.index(slot), pointers, mask=mask)
    return _filled(ring, at, AHEAD, SIZES)


@gluon.jit
def _put_block(
    ring,
    at,
    w_at,
    num_rows,
    num_columns,
    STRIDE: gl.constexpr,
    ROWS: gl.constexpr,
    SIZES: gl.constexpr,
):
    """The same for a block of at most [ROWS, HIGH * WIDE / ROWS], of whole 16 bytes a row."""
    tiles, _, freed = ring
    slot, turn = at
    STAGES: gl.constexpr = SIZES.STAGES
    AHEAD: gl.constexpr = SIZES.AHEAD
    COLUMNS: gl.constexpr = HIGH * SIZES.WIDE // ROWS
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [1, 0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [SIZES.COPIERS, 1], [1, 0])
    row, column = _indices_2d(ROWS, COLUMNS, COPY)
    mask = gl.max_constancy((row < num_rows) & (column < num_columns), [1, 8])
    pointers = gl.multiple_of(_bf16(w_at) + (row * STRIDE + column), [1, 16])
    mbarrier.wait(freed.index(slot), turn ^ 1)
    _copy(_view(tiles, gl.bfloat16, [STAGES, ROWS, COLUMNS], SHARED).index(slot), pointers, mask=mask)
    return _filled(ring, at, AHEAD, SIZES)


@gluon.jit
def _copy_weights(ring, table_ptr, layers, SIZES: gl.constexpr):
    """What the warps do that copy: all stages of the step, in the order in which they are used."""
    WIDE: gl.constexpr = SIZES.WIDE
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    R: gl.constexpr = SIZES.R
    LOW_WIDTH: gl.constexpr = R + 2 * SIZES.N
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    AHEAD: gl.constexpr = SIZES.AHEAD
    OUT_AHEAD: gl.constexpr = SIZES.OUT_AHEAD
    PROGRAMS: gl.constexpr = SIZES.PROGRAMS
    first_c, count_c = _own_channels(SIZES)
    first_o, count_o = _share(H, PROGRAMS)
    LOW_ROWS: gl.constexpr = HIGH * WIDE // BLOCK_C
    at = (first_c * 0, first_c * 0)
    in_next, p_next = gl.load(table_ptr + IN_PROJ), gl.load(table_ptr + X_PROJ)
    dt_next, out_next = gl.load(table_ptr + DT_PROJ), gl.load(table_ptr + OUT_PROJ)
    for layer in range(layers):
        in_at, p_at, dt_at, out_at = in_next, p_next, dt_next, out_next
        entry = table_ptr + gl.minimum(layer + 1, layers - 1) * FIELDS
        in_next, p_next = gl.load(entry + IN_PROJ), gl.load(entry + X_PROJ)
        dt_next, out_next = gl.load(entry + DT_PROJ), gl.load(entry + OUT_PROJ)
        for t in range(SIZES.C_TILES):
            for j in range(H // WIDE):
                row, left = first_c + t * HIGH, count_c - t * HIGH
                at = _put(ring, at, in_at, row, left, j * WIDE, H, AHEAD, SIZES)
        for i in range((LOW_WIDTH + LOW_ROWS - 1) // LOW_ROWS):
            w_at = p_at + (i * LOW_ROWS * D + first_c).to(gl.int64) * 2
            at = _put_block(ring, at, w_at, LOW_WIDTH - i * LOW_ROWS, count_c, D, LOW_ROWS, SIZES)
        for t in range(SIZES.C_TILES):
            for j in range(H // WIDE):
                row, left = D + first_c + t * HIGH, count_c - t * HIGH
                at = _put(ring, at, in_at, row, left, j * WIDE, H, AHEAD, SIZES)
        for i in range((R + LOW_ROWS - 1) // LOW_ROWS):
            w_at = dt_at + (first_c * R + i * LOW_ROWS).to(gl.int64) * 2
            at = _put_block(ring, at, w_at, count_c, R - i * LOW_ROWS, R, BLOCK_C, SIZES)
        for j in range(D // WIDE):
            for t in range(SIZES.O_TILES):
                left = gl.minimum(count_o - t * O_ROWS, O_ROWS)
                at = _put(ring, at, out_at, first_o + t * O_ROWS, left, j * WIDE, D, OUT_AHEAD, SIZES)
    async_copy.wait_group(0)


@gluon.jit
def _inputs(x_ptr, column, rows, WIDE: gl.constexpr, STRIDE: gl.constexpr, BLOCK_B: gl.constexpr, WARPS: gl.constexpr):
    """What a tile is multiplied with: WIDE columns of x [rows, STRIDE], each warp its own."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    INPUT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    OWN: gl.constexpr = WIDE // WARPS
    share, own, b = _indices_3d(WARPS, OWN, BLOCK_B, INPUT)
    offset = column + (b * STRIDE + share * OWN + own)
    pointers = gl.max_contiguous(gl.multiple_of(x_ptr + offset, [1, 16, 1]), [1, 8, 1])
    mask = gl.max_constancy((b < rows) & (share + own >= 0), [1, 8, 1])
    return gl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def _take(ring, at, COUNT: gl.constexpr, SIZES: gl.constexpr):
    """The next COUNT tiles, each warp's columns of them, [WARPS, 16, WIDE / WARPS]."""
    tiles, filled, freed = ring
    WARPS: gl.constexpr = SIZES.WARPS
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    slots = ()
    for i in gl.static_range(COUNT):
        slot, turn = at
        if i == COUNT - 1:
            # a copying thread tells of a tile once its copies of that one and of all before are there
            mbarrier.wait(filled.index(slot), turn)
        slots += (slot,)
        at = _next(at, SIZES.STAGES)
    w = ()
    for i in gl.static_range(COUNT):
        # eight columns in a row for each thread: read 16 bytes at a time, as x is
        w += (tiles.index(slots[i]).load(gl.DotOperandLayout(0, MMA, 8)),)
    # a slot is free once every thread has read it
    _barrier()
    for i in gl.static_range(COUNT):
        mbarrier.arrive(freed.index(slots[i]))
    return at, w


@gluon.jit
def _multiply_block(ring, at, x, acc, ROWS: gl.constexpr, SIZES: gl.constexpr):
    """acc [ROWS, B] and the next block [ROWS, columns] times x [columns, B], each warp its own rows."""
    tiles, filled, freed = ring
    slot, turn = at
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[SIZES.WARPS, 1], instr_shape=[16, 8])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [1, 0])
    mbarrier.wait(filled.index(slot), turn)
    STAGES: gl.constexpr = SIZES.STAGES
    COLUMNS: gl.constexpr = HIGH * SIZES.WIDE // ROWS
    block = _view(tiles, gl.bfloat16, [STAGES, ROWS, COLUMNS], SHARED).index(slot)
    w = block.load(gl.DotOperandLayout(0, MMA, 8))
    _barrier()
    mbarrier.arrive(freed.index(slot))
    return _next(at, SIZES.STAGES), mma_v2(w, x, acc)


@gluon.jit
def _multiply_rows(ring, at, x, sums, first, last, SIZES: gl.constexpr):
    """The next tiles times x, 16 rows after 16 rows: sums [tiles, WARPS, 16, B] of tiles first to last."""
    WARPS: gl.constexpr = SIZES.WARPS
    GROUP: gl.constexpr = SIZES.GROUP
    PIECES: gl.constexpr = SIZES.H // SIZES.WIDE
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    for t in range(first, last):
        acc = gl.zeros([WARPS, HIGH, BLOCK_B], gl.float32, MMA)
        for j in gl.static_range(0, PIECES, GROUP):
            at, w = _take(ring, at, GROUP if j + GROUP <= PIECES else PIECES - j, SIZES)
            for i in gl.static_range(GROUP):
                if j + i < PIECES:
                    acc = mma_v2(w[i], x[j + i], acc)
        sums.index(t).store(acc)
    return at


@gluon.jit
def _total(sums, TILES: gl.constexpr, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """The sums of a phase, [TILES, 16, B]."""
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    WARPS: gl.constexpr = SIZES.WARPS
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    return gl.sum(_view(sums, gl.float32, [TILES, WARPS, HIGH, BLOCK_B], SHARED).load(LAYOUT), axis=1)
