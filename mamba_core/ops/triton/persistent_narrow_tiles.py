"""How weights get into ``persistent_narrow_kernel``'s rings, and its products that are split by columns among warps."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mamba_core.ops.triton.persistent import DT_PROJ, FIELDS, IN_PROJ, OUT_PROJ, _barrier, _bf16, _copy
from mamba_core.ops.triton.persistent_rows_tiles import _indices_3d, _inputs
from mamba_core.ops.triton.persistent_wide_tiles import DEEP, _fetch, _multiply, _put

# columns of what is multiplied at a time by these warps, each its own
WIDE = gl.constexpr(512)
WARPS = gl.constexpr(8)
# outputs that a program has of x_proj, and rows
LOW_HIGH = gl.constexpr(16)
LOW_ROWS = gl.constexpr(8)


@gluon.jit
def _put_out(outs, i, use, w_at, first, SIZES: gl.constexpr):
    """Copy the i-th WIDE columns of rows ``first`` on of out_proj, once their last use is over."""
    tiles, filled, freed = outs
    OWN: gl.constexpr = WIDE // WARPS
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, SIZES.COPIERS, 1], [2, 1, 0])
    share, row, own = _indices_3d(WARPS, SIZES.A, OWN, COPY)
    pointers = gl.multiple_of(_bf16(w_at) + ((first + row) * SIZES.D + (i * WIDE + share * OWN + own)), [1, 1, 16])
    mbarrier.wait(freed.index(i), (use & 1) ^ 1)
    _copy(tiles.index(i), pointers)
    async_copy.mbarrier_arrive(filled.index(i), increment_count=False)
    async_copy.commit_group()
    async_copy.wait_group(SIZES.AHEAD)


@gluon.jit
def _copy_weights(ring, outs, table_ptr, layers, SIZES: gl.constexpr):
    """What the warps do that copy weights: of each layer in_proj, whole turns of a ring, dt_proj, and out_proj."""
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    R: gl.constexpr = SIZES.R
    A: gl.constexpr = SIZES.A
    STAGES: gl.constexpr = SIZES.STAGES
    GROUPS: gl.constexpr = H // A
    TURNS: gl.constexpr = H // DEEP // STAGES
    pid = gl.program_id(0)
    first_c, first_o = pid * (A // 2), pid % GROUPS * A
    in_next, dt_next, out_next = (
        gl.load(table_ptr + IN_PROJ),
        gl.load(table_ptr + DT_PROJ),
        gl.load(table_ptr + OUT_PROJ),
    )
    for layer in range(layers):
        in_at, dt_at, out_at = in_next, dt_next, out_next
        entry = table_ptr + gl.minimum(layer + 1, layers - 1) * FIELDS
        in_next, dt_next, out_next = gl.load(entry + IN_PROJ), gl.load(entry + DT_PROJ), gl.load(entry + OUT_PROJ)
        for j in range(H // DEEP):
            slot = j % STAGES
            use = layer * TURNS + gl.where(slot < 1, layer, 0) + j // STAGES
            _put(ring, slot, use, in_at, first_c, j * DEEP, 2 * D, H, H, True, 0, SIZES)
        # of every pair the second is not there
        _put(ring, 0, layer * (TURNS + 1) + TURNS, dt_at, first_c, 0, D, R, R, True, 0, SIZES)
        for i in range(D // WIDE):
            _put_out(outs, i, layer, out_at, first_o, SIZES)
    async_copy.wait_group(0)


@gluon.jit
def _copy_inputs(inputs, go, gained_ptr, rows, layers, SIZES: gl.constexpr):
    """What the warps do that copy in_proj's inputs, each time once they are told that they are there."""
    TILES: gl.constexpr = SIZES.H // DEEP
    for layer in range(layers):
        mbarrier.wait(go, layer & 1)
        _fetch(inputs, layer * (TILES // SIZES.STAGES), gained_ptr, rows, 0, SIZES.H, TILES, SIZES)
    async_copy.wait_group(0)


@gluon.jit
def _make_products(ring, inputs, sums, done, layers, SIZES: gl.constexpr):
    """What the warps do that make in_proj: its sums, and tell that they are there."""
    TURNS: gl.constexpr = SIZES.H // DEEP // SIZES.STAGES
    for layer in range(layers):
        _multiply(ring, inputs, sums, layer, 0, 0, TURNS, TURNS, 1, SIZES)
        mbarrier.arrive(done)


@gluon.jit
def _low_weights(p_at, first, count, D: gl.constexpr):
    """LOW_HIGH rows of x_proj, of which ``count`` are there, each warp's own columns of each WIDE."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    OWN: gl.constexpr = WIDE // WARPS
    share, row, own = _indices_3d(WARPS, LOW_HIGH, OWN, WEIGHTS)
    mask = gl.max_constancy((row < count) & (share + own >= 0), [1, 1, 8])
    w = ()
    for j in gl.static_range(D // WIDE):
        pointers = _bf16(p_at) + ((first + row) * D + (j * WIDE + share * OWN + own))
        w += (gl.load(gl.max_contiguous(gl.multiple_of(pointers, [1, 1, 16]), [1, 1, 8]), mask=mask, other=0.0),)
    return w


@gluon.jit
def _low_product(w, x_ptr, rows, D: gl.constexpr):
    """w times LOW_ROWS rows of x [*, D], of which ``rows`` are there: [LOW_HIGH, LOW_ROWS]."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    x = ()
    for j in gl.static_range(D // WIDE):
        x += (_inputs(x_ptr, j * WIDE, rows, WIDE, D, LOW_ROWS, WARPS),)
    acc = gl.zeros([WARPS, LOW_HIGH, LOW_ROWS], gl.float32, MMA)
    for j in gl.static_range(D // WIDE):
        acc = mma_v2(w[j], x[j], acc)
    return gl.sum(acc, axis=0)


@gluon.jit
def _out_product(outs, shares, layer, y_ptr, rows, A: gl.constexpr, OWN: gl.constexpr, D: gl.constexpr):
    """This program's outputs of out_proj for its OWN rows of y [*, D], of which ``rows`` are there: [OWN, A]."""
    tiles, filled, freed = outs
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    SUMS: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 32 // OWN, OWN], [1, WARPS, 1], [2, 1, 0])
    y = ()
    for j in gl.static_range(D // WIDE):
        y += (_inputs(y_ptr, j * WIDE, rows, WIDE, D, OWN, WARPS),)
    acc = gl.zeros([WARPS, A, OWN], gl.float32, MMA)
    for j in gl.static_range(D // WIDE):
        mbarrier.wait(filled.index(j), layer & 1)
        acc = mma_v2(tiles.index(j).load(gl.DotOperandLayout(0, MMA, 8)), y[j], acc)
    shares.store(acc)
    _barrier()
    for j in gl.static_range(D // WIDE):
        mbarrier.arrive(freed.index(j))
    return gl.sum(shares.load(SUMS), axis=0).permute((1, 0))
