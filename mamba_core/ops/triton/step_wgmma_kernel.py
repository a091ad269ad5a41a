"""Products of a decode step of many rows, on the matrix units of Hopper (sm_90).

One warp fetches tiles into a ring of shared memory, by the unit that copies tensors; the others multiply what has come.
A tile of rows is the first operand, 64 or 128 high; the outputs of a program are a power of two and a second, smaller
one, so that 128 of 132 multiprocessors have equal work where the number of outputs is not a power of two.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mamba_core.ops.triton.persistent import _barrier, _view

# it was renamed after Triton 3.6
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_copy_back = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


class Sizes(NamedTuple):
    """What a kernel is compiled for: the tile of a program, ROWS x (A + B) outputs, and STAGES of its ring.

    PDL to start while the kernel before still runs.
    """

    ROWS: int
    A: int
    B: int
    STAGES: int
    PDL: bool


# inputs of a tile: 128 bytes of a row, as the matrix units read them
DEEP = gl.constexpr(64)
TILES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# slots of a ring whose weights are asked for before the kernel before has ended: with all of them, what that one still
# reads would wait behind them
EARLY = gl.constexpr(8)
# of a thread of the warps that fetch; the others share what is left
FETCH_REGISTERS = gl.constexpr(40)


@gluon.jit
def _fetch_weights(ring, w_descs, slot, column, first_output, pred, SIZES: gl.constexpr):
    """Announce all that comes into a slot, and copy its weights."""
    _, a_tiles, b_tiles, filled, _ = ring
    BYTES: gl.constexpr = (SIZES.ROWS + SIZES.A + SIZES.B) * DEEP * 2
    mbarrier.expect(filled.index(slot), BYTES, pred=pred)
    _copy(w_descs[0], [first_output, column], filled.index(slot), a_tiles.index(slot), pred=pred)
    if SIZES.B > 0:
        _copy(w_descs[1], [first_output + SIZES.A, column], filled.index(slot), b_tiles.index(slot), pred=pred)


@gluon.jit
def _fetch(ring, x_desc, w_descs, first_row, first_output, begin, steps, SIZES: gl.constexpr):
    """What the warp does that fetches: ``steps`` tiles from tile ``begin`` of the inputs on.

    The first weights are on their way before the kernel before has ended.
    """
    x_tiles, _, _, filled, freed = ring
    STAGES: gl.constexpr = SIZES.STAGES
    AHEAD: gl.constexpr = STAGES if STAGES < EARLY else EARLY
    for i in gl.static_range(AHEAD):
        _fetch_weights(ring, w_descs, i, (begin + i) * DEEP, first_output, i < steps, SIZES)
    if SIZES.PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        if i >= AHEAD:
            _fetch_weights(ring, w_descs, i, (begin + i) * DEEP, first_output, i < steps, SIZES)
        _copy(x_desc, [first_row, (begin + i) * DEEP], filled.index(i), x_tiles.index(i), pred=i < steps)
    for step in range(STAGES, steps):
        slot = step % STAGES
        mbarrier.wait(freed.index(slot), (step // STAGES - 1) & 1)
        _fetch_weights(ring, w_descs, slot, (begin + step) * DEEP, first_output, True, SIZES)
        _copy(x_desc, [first_row, (begin + step) * DEEP], filled.index(slot), x_tiles.index(slot))


@gluon.jit
def _multiply(ring, steps, SIZES: gl.constexpr):
    """[ROWS, A] and [ROWS, B] fp32: the sums of ``steps`` tiles."""
    A: gl.constexpr = SIZES.A
    B: gl.constexpr = SIZES.B
    ROWS: gl.constexpr = SIZES.ROWS
    STAGES: gl.constexpr = SIZES.STAGES
    WARPS: gl.constexpr = gl.num_warps()
    MMA_A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, A, 16])
    MMA_B: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, B if B > 0 else 8, 16]
    )
    x_tiles, a_tiles, b_tiles, filled, freed = ring
    acc_a = gl.zeros([ROWS, A], gl.float32, MMA_A)
    acc_b = gl.zeros([ROWS, B if B > 0 else 8], gl.float32, MMA_B)
    slot = 0
    before = 0
    phase = 0
    for step in range(steps):
        mbarrier.wait(filled.index(slot), phase)
        x = x_tiles.index(slot)
        acc_a = warpgroup_mma(x, a_tiles.index(slot).permute((1, 0)), acc_a, is_async=True)
        if B > 0:
            acc_b = warpgroup_mma(x, b_tiles.index(slot).permute((1, 0)), acc_b, is_async=True)
            acc_a, acc_b = warpgroup_mma_wait(2, deps=(acc_a, acc_b))
        else:
            acc_a = warpgroup_mma_wait(1, deps=(acc_a,))
        # the tile before is free once every warp has read it
        _barrier()
        mbarrier.arrive(freed.index(before), pred=step > 0)
        before = slot
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    if B > 0:
        acc_a, acc_b = warpgroup_mma_wait(0, deps=(acc_a, acc_b))
    else:
        acc_a = warpgroup_mma_wait(0, deps=(acc_a,))
    return acc_a, acc_b


@gluon.constexpr_function
def layout_of(columns):
    """Of a tile [rows, columns] in 16 bits as it leaves, on the host as well."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.jit
def _leaving(memory, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile of outputs where others were."""
    LAYOUT: gl.constexpr = layout_of(COLUMNS)
    return _view(memory, gl.bfloat16, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def _project(ring, y_descs, first_row, first_output, steps, SIZES: gl.constexpr):
    """What the warps do that multiply, of a product that is written in bf16."""
    x_tiles, a_tiles, _, _, _ = ring
    acc_a, acc_b = _multiply(ring, steps, SIZES)
    # nobody reads the ring any more: outputs leave through it
    _barrier()
    y_a = _leaving(x_tiles, SIZES.ROWS, SIZES.A)
    y_a.store(acc_a.to(gl.bfloat16))
    if SIZES.B > 0:
        y_b = _leaving(a_tiles, SIZES.ROWS, SIZES.B)
        y_b.store(acc_b.to(gl.bfloat16))
    fence_async_shared()
    _barrier()
    _copy_back(y_descs[0], [first_row, first_output], y_a)
    if SIZES.B > 0:
        _copy_back(y_descs[1], [first_row, first_output + SIZES.A], y_b)
    tma.store_wait(0)


@gluon.jit
def _put(acc, share_ptr, first_row, first_output, num_rows, out_width):
    HIGH: gl.constexpr = acc.type.shape[0]
    WIDE: gl.constexpr = acc.type.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    b = first_row + gl.arange(0, HIGH, layout=gl.SliceLayout(1, LAYOUT))
    n = first_output + gl.arange(0, WIDE, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(share_ptr + (b[:, None] * out_width + n[None, :]), acc, mask=(b < num_rows)[:, None] & (n >= 0)[None, :])


@gluon.jit
def _share(ring, share_ptr, first_row, first_output, num_rows, out_width, steps, SIZES: gl.constexpr):
    """What the warps do that multiply, of a product in shares of fp32."""
    acc_a, acc_b = _multiply(ring, steps, SIZES)
    _put(acc_a, share_ptr, first_row, first_output, num_rows, out_width)
    if SIZES.B > 0:
        _put(acc_b, share_ptr, first_row, first_output + SIZES.A, num_rows, out_width)


@gluon.jit
def _ring(SIZES: gl.constexpr):
    """Tiles of inputs and of weights, and the barriers that tell which have come and which are free again."""
    STAGES: gl.constexpr = SIZES.STAGES
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SIZES.ROWS, DEEP], TILES)
    a_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SIZES.A, DEEP], TILES)
    b_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SIZES.B, DEEP], TILES) if SIZES.B > 0 else a_tiles
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(freed.index(i), count=1)
    fence_async_shared()
    return x_tiles, a_tiles, b_tiles, filled, freed


@gluon.jit(do_not_specialize=["in_tiles"])
def wgmma_kernel(x_desc, a_desc, b_desc, y_a_desc, y_b_desc, in_tiles, SIZES: gl.constexpr):
    """y [B, out] = x [B, in] W^T. Of W [out, in] and of y, descriptors of tiles with A outputs and with B."""
    if SIZES.PDL:
        gdc_launch_dependents()
    ring = _ring(SIZES)
    first_row = gl.program_id(0) * SIZES.ROWS
    first_output = gl.program_id(1) * (SIZES.A + SIZES.B)
    w_descs = (a_desc, b_desc)
    gl.warp_specialize(
        [
            (_project, (ring, (y_a_desc, y_b_desc), first_row, first_output, in_tiles, SIZES)),
            (_fetch, (ring, x_desc, w_descs, first_row, first_output, 0, in_tiles, SIZES)),
        ],
        [1],
        [FETCH_REGISTERS],
    )


@gluon.jit(do_not_specialize=["num_rows", "in_tiles"])
def wgmma_shared_kernel(
    x_desc, a_desc, b_desc, share_ptr, num_rows, out_width, in_tiles, SHARE: gl.constexpr, SIZES: gl.constexpr
):
    """x [B, in] W^T with SHARE tiles of inputs to a program: ``share`` [shares, B, out] fp32."""
    if SIZES.PDL:
        gdc_launch_dependents()
    ring = _ring(SIZES)
    first_row = gl.program_id(0) * SIZES.ROWS
    first_output = gl.program_id(1) * (SIZES.A + SIZES.B)
    begin = gl.program_id(2) * SHARE
    steps = gl.minimum(in_tiles - begin, SHARE)
    share_ptr += gl.program_id(2) * num_rows * out_width
    w_descs = (a_desc, b_desc)
    gl.warp_specialize(
        [
            (_share, (ring, share_ptr, first_row, first_output, num_rows, out_width, steps, SIZES)),
            (_fetch, (ring, x_desc, w_descs, first_row, first_output, begin, steps, SIZES)),
        ],
        [1],
        [FETCH_REGISTERS],
    )
