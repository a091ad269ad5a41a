"""The small products of ``persistent_wide_kernel``, and its recurrence."""

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

from mamba_core.ops.triton.persistent import _barrier, _view
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d, _nothing
from mamba_core.ops.triton.persistent_wide_conv import _counts, _one_thread_each
from mamba_core.ops.triton.persistent_wide_parts import (
    PART,
    _embedded,
    _gain,
    _inputs_of_state,
    _keep,
    _moved,
    _share,
    _shared,
    _state,
    _tell,
)
from mamba_core.ops.triton.persistent_wide_tiles import DEEP, GROUPS, PROGRAMS, ROWS

# rows of the residual that a program has
OWN = gl.constexpr(16)


class Told(NamedTuple):
    """Where programs tell each other what they have made: pointers to the rooms that the kernel is given."""

    shares: Any
    low: Any
    dt: Any
    y: Any
    parts: Any
    gained: Any
    squares: Any


@gluon.constexpr_function
def _outputs(count):
    """Of this program's part of the residual, [16, count]."""
    if count == 16:
        return gl.BlockedLayout([1, 1], [2, 16], [8, 1], [1, 0])
    return gl.BlockedLayout([1, 4], [128 // count, count // 4], [8, 1], [1, 0])


@gluon.constexpr_function
def _four_sums(count):
    """Of out_proj's sums, [64, count]: four outputs a thread."""
    return gl.BlockedLayout([1, 4], [128 // count, count // 4], [8, 1], [1, 0])


@gluon.jit
def _in_place_of(sums, SIZES: gl.constexpr):
    """Room for step sizes and for the convolution's newest inputs, in the place of sums that have been read."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    halves = _view(sums[0], gl.float32, [2, ROWS, SIZES.A // 2], FLAT)
    deltas, news = (halves.index(0),), (halves.index(1),)
    if SIZES.B > 0:
        rest = _view(sums[1], gl.float32, [2, ROWS, 8], FLAT)
        deltas, news = (deltas[0], rest.index(0)), (news[0], rest.index(1))
    return deltas, news


@gluon.jit
def _newest(news, SIZES: gl.constexpr):
    """The convolution's newest inputs, as the threads write them that keep the ones before."""
    COUNTS: gl.constexpr = _counts(SIZES)
    newest = ()
    for p in gl.static_range(len(COUNTS)):
        newest += (news[p].load(_one_thread_each(COUNTS[p])),)
    return newest


@gluon.jit
def _share_low(ring, use, x, shares_ptr, SIZES: gl.constexpr):
    """x_proj of this program's channels x [64, 64], the first slots of the ring: its share of low for all to add up."""
    A: gl.constexpr = SIZES.A
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    TILES: gl.constexpr = (LOW_WIDTH + A - 1) // A
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, A // 2, 16])
    w_tiles, _, filled, freed = ring
    shares = ()
    for i in gl.static_range(TILES):
        mbarrier.wait(filled.index(i), use & 1)
        share = gl.zeros([ROWS, A], gl.float32, MMA)
        shares += (warpgroup_mma(x, w_tiles.index(i + _nothing()).permute((1, 0)), share, is_async=True),)
    shares = warpgroup_mma_wait(0, deps=shares) if TILES > 1 else (warpgroup_mma_wait(0, deps=shares),)
    _barrier()
    for i in gl.static_range(TILES):
        mbarrier.arrive(freed.index(i))
        b, o = _indices_2d(ROWS, A, MMA)
        share_ptr = shares_ptr + gl.program_id(0) * (SIZES.SPACE * LOW_WIDTH) + (b * LOW_WIDTH + i * A + o)
        gl.store(share_ptr, shares[i], mask=(i * A + o < LOW_WIDTH) & (b < SIZES.SPACE))


@gluon.jit
def _sum_low(told, SIZES: gl.constexpr):
    """Add up all programs' shares of a few elements of low, in their order."""
    SIZE: gl.constexpr = SIZES.SPACE * (SIZES.R + 2 * SIZES.N)
    EACH: gl.constexpr = SIZE // PROGRAMS
    # four sums a thread of each warp's programs
    SHARES: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    pid = gl.program_id(0)
    s, i = _indices_2d(PROGRAMS, 128, SHARES)
    some_ptr = gl.multiple_of(told.shares + (s * SIZE + pid * EACH + i), [1, 16])
    mask = gl.max_constancy((i < EACH) & (s >= 0), [1, 4])
    total = gl.sum(gl.load(some_ptr, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    i = gl.arange(0, 128, layout=gl.SliceLayout(0, SHARES)) + _nothing()
    gl.store(told.low + pid * EACH + i, total, mask=i < EACH)
    gl.store(told.dt + pid * EACH + i, total.to(gl.bfloat16), mask=i < EACH)


@gluon.jit
def _lows(dt_ptr, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """dt_proj's inputs, in tiles of 64 columns."""
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    lows = ()
    b, r = _indices_2d(ROWS, DEEP, LAYOUT)
    for i in gl.static_range((SIZES.R + DEEP - 1) // DEEP):
        mask = gl.max_constancy((i * DEEP + r < SIZES.R) & (b < SIZES.SPACE), [1, 8])
        low_at = gl.multiple_of(dt_ptr + (b * LOW_WIDTH + i * DEEP + r), [1, 16])
        lows += (gl.load(low_at, mask=mask, other=0.0, cache_modifier=".cg"),)
    return lows


@gluon.jit
def _multiply_dt(ring, use, x_tiles, lows, SIZES: gl.constexpr):
    """dt_proj's sums for this program's channels, behind x_proj in the ring: [64, A] and [64, 16], every second one."""
    A: gl.constexpr = SIZES.A
    B: gl.constexpr = SIZES.B
    FIRST: gl.constexpr = (SIZES.R + 2 * SIZES.N + A - 1) // A
    TILES: gl.constexpr = (SIZES.R + DEEP - 1) // DEEP
    MMA_A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, A // 2, 16])
    MMA_B: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 8, 16])
    a_tiles, b_tiles, filled, freed = ring
    for i in gl.static_range(TILES):
        x_tiles.index(i + _nothing()).store(lows[i])
    fence_async_shared()
    _barrier()
    dts = (gl.zeros([ROWS, A], gl.float32, MMA_A), gl.zeros([ROWS, 16], gl.float32, MMA_B))
    for i in gl.static_range(TILES):
        mbarrier.wait(filled.index(FIRST + i), use & 1)
        nothing = _nothing()
        low = x_tiles.index(i + nothing)
        dt_a = warpgroup_mma(low, a_tiles.index(FIRST + i + nothing).permute((1, 0)), dts[0], is_async=True)
        dt_b = dts[1]
        if B > 0:
            dt_b = warpgroup_mma(low, b_tiles.index(FIRST + i + nothing).permute((1, 0)), dts[1], is_async=True)
        dts = (dt_a, dt_b)
    dts = warpgroup_mma_wait(0, deps=dts) if B > 0 else (warpgroup_mma_wait(0, deps=(dts[0],)), dts[1])
    _barrier()
    for i in gl.static_range(TILES):
        mbarrier.arrive(freed.index(FIRST + i))
    return dts


@gluon.jit
def _advance_states(
    ssm, slots, h, constants, inner, deltas, kept, told, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr
):
    """The recurrence, PART rows after the other: their states moved on, and y. h and inner: the first parts', read."""
    D: gl.constexpr = SIZES.D
    N: gl.constexpr = SIZES.N
    DEPTH: gl.constexpr = SIZES.DEPTH
    PARTS: gl.constexpr = SIZES.SPACE // PART
    COUNTS: gl.constexpr = _counts(SIZES)
    PIECES: gl.constexpr = len(COUNTS)
    CHANNEL: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    x_flat, gates = kept
    for part in gl.static_range(PARTS):
        now = inner
        if part + 1 < PARTS:
            inner = _inputs_of_state(told.low, part + 1, SIZES.R, N, gl.SliceLayout(1, LAYOUT))
        for p in gl.static_range(PIECES):
            first = own.channel + p * (SIZES.A // 2)
            if part > 0 and part + DEPTH <= PARTS:
                h += (_state(ssm, slots[part + DEPTH - 1], first, part + DEPTH - 1, rows, COUNTS[p], N, LAYOUT),)
            delta = deltas[p].slice(part * PART, PART).load(CHANNEL)
            x = x_flat.slice(part * PART, PART).slice(p * (SIZES.A // 2), COUNTS[p], dim=1).load(CHANNEL)
            gate = gates[p].slice(part * PART, PART).load(CHANNEL)
            moved, y = _moved(h[part * PIECES + p], constants[p], now, delta, x, gate)
            b, d = _indices_2d(PART, COUNTS[p], CHANNEL)
            y_at = told.y + ((part * PART + b) * D + first + d)
            gl.store(y_at, y.to(gl.bfloat16), mask=(part * PART + b < rows) & (d >= 0))
            _keep(ssm, slots[part], first, part, rows, moved, LAYOUT)


@gluon.jit
def _gains(gain_ptr, own, SIZES: gl.constexpr):
    """Those of a norm, for this program's outputs."""
    gains = (_gain(gain_ptr, own.output, SIZES.A, _outputs(SIZES.A)),)
    if SIZES.B > 0:
        gains += (_gain(gain_ptr, own.output + SIZES.A, SIZES.B, _outputs(SIZES.B)),)
    return gains


@gluon.jit
def _tell_squares(squares, told, own):
    """Write those of this program's part of the residual."""
    b = gl.program_id(0) % GROUPS * ROWS + own.row + gl.arange(0, OWN, layout=squares.type.layout)
    gl.store(told.squares + b, squares)


@gluon.jit
def _embed(begin, told, own, rows, SIZES: gl.constexpr):
    """This program's part of the residual, [16, A] and [16, B]: the tokens' embeddings, told with the first gain."""
    H: gl.constexpr = SIZES.H
    A: gl.constexpr = SIZES.A
    B: gl.constexpr = SIZES.B
    OUT_A: gl.constexpr = _outputs(A)
    OUT_B: gl.constexpr = _outputs(16)
    tokens_ptr, embeddings_ptr, gain_ptr = begin
    _, first_row, first = own
    residual = _embedded(tokens_ptr, embeddings_ptr, first_row, first, rows, H, OWN, A, OUT_A)
    squares = _tell(residual, _gain(gain_ptr, first, A, OUT_A), told.gained, first_row, first, rows, H)
    rest = gl.zeros([OWN, 16], gl.float32, OUT_B)
    if B > 0:
        rest += _embedded(tokens_ptr, embeddings_ptr, first_row, first + A, rows, H, OWN, B, OUT_B)
        more = _tell(rest, _gain(gain_ptr, first + A, B, OUT_B), told.gained, first_row, first + A, rows, H)
        squares += gl.convert_layout(more, squares.type.layout)
    _tell_squares(squares, told, own)
    return residual, rest


@gluon.jit
def _share_out(sums, parts_ptr, own, rows, SIZES: gl.constexpr):
    """Write this program's share of out_proj."""
    quarter = gl.program_id(0) // GROUPS
    WIDTHS: gl.constexpr = (SIZES.A, SIZES.B)
    for p in gl.static_range(2 if SIZES.B > 0 else 1):
        share = sums[p].load(_four_sums(WIDTHS[p]))
        _share(share, parts_ptr + quarter * (ROWS * SIZES.H), own.output + p * SIZES.A, rows, SIZES.H)


@gluon.jit
def _add_shares(residual, gains, told, own, rows, SIZES: gl.constexpr):
    """The residual with all shares of out_proj, told with the gains of the norm that follows."""
    H: gl.constexpr = SIZES.H
    A: gl.constexpr = SIZES.A
    B: gl.constexpr = SIZES.B
    residual, rest = residual
    _, first_row, first = own
    residual += _shared(told.parts, first_row, first, rows, H, OWN, A, _outputs(A))
    squares = _tell(residual, gains[0], told.gained, first_row, first, rows, H)
    if B > 0:
        rest += _shared(told.parts, first_row, first + A, rows, H, OWN, B, _outputs(B))
        more = _tell(rest, gains[1], told.gained, first_row, first + A, rows, H)
        squares += gl.convert_layout(more, squares.type.layout)
    _tell_squares(squares, told, own)
    return residual, rest
