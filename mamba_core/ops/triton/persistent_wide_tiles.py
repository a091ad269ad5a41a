"""The two rings of ``persistent_wide_kernel``: how weights and inputs get into them, and how they are multiplied."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mamba_core.ops.triton.persistent import (
    DT_PROJ,
    FIELDS,
    IN_PROJ,
    OUT_PROJ,
    X_PROJ,
    _barrier,
    _bf16,
    _copy,
)
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d, _nothing


class Sizes(NamedTuple):
    """What a kernel is compiled for.

    H, D, R, N and K of a layer. A + B: outputs of a program of the large products, a power of two and the rest. SPACE:
    rows at the most. STAGES: tiles that the rings hold. COPIERS: warps that copy
    weights, AHEAD tiles and one more at a time, and as many that copy inputs. DEPTH: of the rows' states, PART rows
    each, so many are read ahead.
    """

    H: int
    D: int
    R: int
    N: int
    K: int
    A: int
    B: int
    SPACE: int
    STAGES: int
    COPIERS: int
    AHEAD: int
    DEPTH: int
    SKIP_DTYPE: Any = gl.float32
    HAS_CONV_BIAS: bool = True
    TAP_MAJOR: bool = True


# rows of a tile of inputs, and columns of every tile
ROWS = gl.constexpr(64)
DEEP = gl.constexpr(64)
# programs; shares of out_proj's inputs, and of its outputs
PROGRAMS = gl.constexpr(128)
QUARTERS = gl.constexpr(4)
GROUPS = gl.constexpr(32)
# as the matrix units read them: 128 bytes of a row, swizzled
TILES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def _rows_of(
    w_at,
    first,
    column,
    last_row,
    last_column,
    HIGH: gl.constexpr,
    STRIDE: gl.constexpr,
    PAIRED: gl.constexpr,
    SIZES: gl.constexpr,
):
    """Pointers to HIGH rows of 64 columns of W [*, STRIDE], and which of them are there.

    PAIRED: rows ``first``, ``first`` + D, ``first`` + 1, ``first`` + 1 + D and so on.
    """
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [SIZES.COPIERS, 1], [1, 0])
    r, k = _indices_2d(HIGH, DEEP, COPY)
    row = first + (r // 2 + r % 2 * SIZES.D if PAIRED else r)
    pointers = gl.multiple_of(_bf16(w_at) + (row * STRIDE + (column + k)), [1, 16])
    return pointers, gl.max_constancy((row < last_row) & (column + k < last_column), [1, 8])


@gluon.jit
def _put(
    ring,
    slot,
    use,
    w_at,
    first,
    column,
    last_row,
    last_column,
    STRIDE: gl.constexpr,
    PAIRED: gl.constexpr,
    REST: gl.constexpr,
    SIZES: gl.constexpr,
):
    """Copy A + REST rows of ``_rows_of`` into a slot for its use-th use, once it is free; absent ones are zero."""
    a_tiles, b_tiles, filled, freed = ring
    pointers, mask = _rows_of(w_at, first, column, last_row, last_column, SIZES.A, STRIDE, PAIRED, SIZES)
    mbarrier.wait(freed.index(slot), (use & 1) ^ 1)
    _copy(a_tiles.index(slot), pointers, mask=mask)
    if REST > 0:
        first += SIZES.A // 2 if PAIRED else SIZES.A
        pointers, mask = _rows_of(w_at, first, column, last_row, last_column, REST, STRIDE, PAIRED, SIZES)
        _copy(b_tiles.index(slot), pointers, mask=mask)
    async_copy.mbarrier_arrive(filled.index(slot), increment_count=False)
    async_copy.commit_group()
    # more on its way than keeps memory busy would only stand before the loads that others wait for
    async_copy.wait_group(SIZES.AHEAD)


@gluon.jit
def _copy_weights(ring, table_ptr, layers, SIZES: gl.constexpr):
    """What the warps do that copy weights: all tiles of the step, in the order in which they are used.

    Of a layer, in_proj takes whole turns of the ring, then x_proj and dt_proj its first slots, then out_proj
    whole turns.
    """
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    R: gl.constexpr = SIZES.R
    B: gl.constexpr = SIZES.B
    STAGES: gl.constexpr = SIZES.STAGES
    LOW_WIDTH: gl.constexpr = R + 2 * SIZES.N
    C: gl.constexpr = D // PROGRAMS
    SHARE: gl.constexpr = D // QUARTERS
    LOW_TILES: gl.constexpr = (LOW_WIDTH + SIZES.A - 1) // SIZES.A
    SMALL: gl.constexpr = LOW_TILES + (R + DEEP - 1) // DEEP
    IN_TURNS: gl.constexpr = H // DEEP // STAGES
    TURNS: gl.constexpr = IN_TURNS + SHARE // DEEP // STAGES
    pid = gl.program_id(0)
    first_c, quarter, first_o = pid * C, pid // GROUPS, pid % GROUPS * (H // GROUPS)
    last_c = first_c + C
    in_next, p_next = gl.load(table_ptr + IN_PROJ), gl.load(table_ptr + X_PROJ)
    dt_next, out_next = gl.load(table_ptr + DT_PROJ), gl.load(table_ptr + OUT_PROJ)
    for layer in range(layers):
        in_at, p_at, dt_at, out_at = in_next, p_next, dt_next, out_next
        entry = table_ptr + gl.minimum(layer + 1, layers - 1) * FIELDS
        in_next, p_next = gl.load(entry + IN_PROJ), gl.load(entry + X_PROJ)
        dt_next, out_next = gl.load(entry + DT_PROJ), gl.load(entry + OUT_PROJ)
        for j in range(H // DEEP):
            slot = j % STAGES
            use = layer * TURNS + gl.where(slot < SMALL, layer, 0) + j // STAGES
            _put(ring, slot, use, in_at, first_c, j * DEEP, 2 * D, H, H, True, B, SIZES)
        use = layer * (TURNS + 1) + IN_TURNS
        for i in range(LOW_TILES):
            _put(ring, i, use, p_at, i * SIZES.A, first_c, LOW_WIDTH, last_c, D, False, 0, SIZES)
        for j in range(SMALL - LOW_TILES):
            # of every pair the second is not there
            _put(ring, LOW_TILES + j, use, dt_at, first_c, j * DEEP, D, R, R, True, B, SIZES)
        for j in range(SHARE // DEEP):
            slot = j % STAGES
            use = layer * TURNS + gl.where(slot < SMALL, layer + 1, 0) + IN_TURNS + j // STAGES
            column = quarter * SHARE + j * DEEP
            _put(ring, slot, use, out_at, first_o, column, H, D, D, False, B, SIZES)
    async_copy.wait_group(0)


@gluon.jit
def _fetch(
    inputs,
    use,
    x_ptr,
    rows,
    first,
    STRIDE: gl.constexpr,
    STEPS: gl.constexpr,
    SIZES: gl.constexpr,
):
    """Copy STEPS tiles of x [rows, STRIDE] from column ``first`` on, whole turns of the ring; absent rows are zero."""
    tiles, filled, freed = inputs
    STAGES: gl.constexpr = SIZES.STAGES
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [SIZES.COPIERS, 1], [1, 0])
    b, k = _indices_2d(ROWS, DEEP, COPY)
    mask = gl.max_constancy((b < rows) & (k >= 0), [1, DEEP])
    for j in range(STEPS):
        slot = j % STAGES
        pointers = gl.multiple_of(x_ptr + (b * STRIDE + (first + j * DEEP + k)), [1, 16])
        mbarrier.wait(freed.index(slot), ((use + j // STAGES) & 1) ^ 1)
        _copy(tiles.index(slot), pointers, mask=mask)
        async_copy.mbarrier_arrive(filled.index(slot), increment_count=False)


@gluon.jit
def _copy_inputs(inputs, go, gained_ptr, y_ptr, rows, layers, SIZES: gl.constexpr):
    """What the warps do that copy what weights are multiplied with, each time once they are told that it is there."""
    H: gl.constexpr = SIZES.H
    SHARE: gl.constexpr = SIZES.D // QUARTERS
    IN_TURNS: gl.constexpr = H // DEEP // SIZES.STAGES
    TURNS: gl.constexpr = IN_TURNS + SHARE // DEEP // SIZES.STAGES
    first = gl.program_id(0) // GROUPS * SHARE
    for layer in range(layers):
        mbarrier.wait(go, 0)
        _fetch(inputs, layer * TURNS, gained_ptr, rows, 0, H, H // DEEP, SIZES)
        mbarrier.wait(go, 1)
        _fetch(inputs, layer * TURNS + IN_TURNS, y_ptr, rows, first, SIZES.D, SHARE // DEEP, SIZES)
    async_copy.wait_group(0)


@gluon.jit
def _multiply(
    ring,
    inputs,
    sums,
    layer,
    BEFORE: gl.constexpr,
    SMALL_BEFORE: gl.constexpr,
    ROUNDS: gl.constexpr,
    TURNS: gl.constexpr,
    SMALL: gl.constexpr,
    SIZES: gl.constexpr,
):
    """sums [64, A] and [64, B]: tiles of inputs times tiles of weights, of ROUNDS turns of the ring.

    BEFORE of the layer's TURNS are those of another product, and SMALL_BEFORE of those of the slots below SMALL.
    """
    A: gl.constexpr = SIZES.A
    B: gl.constexpr = SIZES.B
    STAGES: gl.constexpr = SIZES.STAGES
    MMA_A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, A, 16])
    MMA_B: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    EACH: gl.constexpr = 2 if B > 0 else 1
    a_tiles, b_tiles, filled, freed = ring
    x_tiles, x_filled, x_freed = inputs
    acc_a = gl.zeros([ROWS, A], gl.float32, MMA_A)
    acc_b = gl.zeros([ROWS, 16], gl.float32, MMA_B)
    for round in range(ROUNDS):
        turn = layer * TURNS + BEFORE + round
        for slot in gl.static_range(STAGES):
            use = turn + layer + SMALL_BEFORE if slot < SMALL else turn
            mbarrier.wait(filled.index(slot), use & 1)
            mbarrier.wait(x_filled.index(slot), turn & 1)
            nothing = _nothing()
            x = x_tiles.index(slot + nothing)
            acc_a = warpgroup_mma(x, a_tiles.index(slot + nothing).permute((1, 0)), acc_a, is_async=True)
            if B > 0:
                acc_b = warpgroup_mma(x, b_tiles.index(slot + nothing).permute((1, 0)), acc_b, is_async=True)
                acc_a, acc_b = warpgroup_mma_wait(EACH, deps=(acc_a, acc_b))
            else:
                acc_a = warpgroup_mma_wait(EACH, deps=(acc_a,))
            # the slot before is free once every warp has read it
            _barrier()
            if slot > 0:
                mbarrier.arrive(freed.index(slot - 1))
                mbarrier.arrive(x_freed.index(slot - 1))
            else:
                mbarrier.arrive(freed.index(STAGES - 1), pred=round > 0)
                mbarrier.arrive(x_freed.index(STAGES - 1), pred=round > 0)
    if B > 0:
        acc_a, acc_b = warpgroup_mma_wait(0, deps=(acc_a, acc_b))
        sums[1].store(acc_b)
    else:
        acc_a = warpgroup_mma_wait(0, deps=(acc_a,))
    sums[0].store(acc_a)
    _barrier()
    mbarrier.arrive(freed.index(STAGES - 1))
    mbarrier.arrive(x_freed.index(STAGES - 1))


@gluon.jit
def _make_products(ring, inputs, sums, done, layers, SIZES: gl.constexpr):
    """What the warps do that make the two large products: their sums, and tell that they are there."""
    LOW_TILES: gl.constexpr = (SIZES.R + 2 * SIZES.N + SIZES.A - 1) // SIZES.A
    SMALL: gl.constexpr = LOW_TILES + (SIZES.R + DEEP - 1) // DEEP
    IN_TURNS: gl.constexpr = SIZES.H // DEEP // SIZES.STAGES
    OUT_TURNS: gl.constexpr = SIZES.D // QUARTERS // DEEP // SIZES.STAGES
    TURNS: gl.constexpr = IN_TURNS + OUT_TURNS
    for layer in range(layers):
        _multiply(ring, inputs, sums, layer, 0, 0, IN_TURNS, TURNS, SMALL, SIZES)
        mbarrier.arrive(done)
        _multiply(ring, inputs, sums, layer, IN_TURNS, 1, OUT_TURNS, TURNS, SMALL, SIZES)
        mbarrier.arrive(done)
