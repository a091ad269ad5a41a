"""What a program of ``persistent_rows_kernel`` reads of its own, and what it tells the others of the residual."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.math import LOG2_E
from mamba_core.ops.triton.persistent import DECAY, DT_BIAS, GAIN, SKIP, Begin, States, _bf16
from mamba_core.ops.triton.persistent_rows_tiles import HIGH, _indices_2d, _indices_3d, _nothing, _total


class Told(NamedTuple):
    """Where programs tell each other what they have made: pointers to the rooms that the kernel is given."""

    shares: Any
    low: Any
    y: Any
    gained: Any
    squares: Any


class Kept(NamedTuple):
    """What is kept of a layer in shared memory: x, gates [B, channels], dt [channels, B] and dt_proj's inputs."""

    x: Any
    z: Any
    dt: Any
    low: Any


class Weights(NamedTuple):
    """Addresses of what the recurrence of a layer needs, and of the gain of the norm that follows."""

    dt_bias: Any
    decay: Any
    skip: Any
    gain: Any


@gluon.constexpr_function
def _layout_of_sums(space, rows, warps):
    """[tiles, warps, 16, B], room for ``space`` tiles."""
    return gl.BlockedLayout([1, warps, 1, 1], [1, 1, 32 // rows, rows], [space, 1, warps // space, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def _layout_of_states(sizes):
    """[8, channels, N]."""
    return gl.BlockedLayout([1, 1, 4], [1, 8, 4], [sizes.WARPS // sizes.S_WARPS, sizes.S_WARPS, 1], [2, 1, 0])


@gluon.jit
def _of_group(begin, states, told, counter_ptr, SIZES: gl.constexpr):
    """The pointers of all, to what this group of programs has of it."""
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    group = gl.program_id(1)
    tokens_ptr = begin.tokens + group * BLOCK_B
    slots_ptr = states.slots + group * BLOCK_B
    gained_ptr = told.gained + group * (BLOCK_B * SIZES.H)
    y_ptr = told.y + group * (BLOCK_B * SIZES.D)
    low_ptr = told.low + group * (BLOCK_B * LOW_WIDTH)
    shares_ptr = told.shares + group * (SIZES.PROGRAMS * LOW_WIDTH * BLOCK_B)
    squares_ptr = told.squares + group * BLOCK_B
    conv_ptr, ssm_ptr, conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride, _ = states
    return (
        Begin(tokens_ptr, begin.embeddings, begin.gain),
        States(conv_ptr, ssm_ptr, conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride, slots_ptr),
        Told(shares_ptr, low_ptr, y_ptr, gained_ptr, squares_ptr),
        counter_ptr + group * 32,
    )


@gluon.jit
def _weights_of_states(entry):
    dt_bias_at, decay_at = gl.load(entry + DT_BIAS), gl.load(entry + DECAY)
    return Weights(dt_bias_at, decay_at, gl.load(entry + SKIP), gl.load(entry + GAIN))


@gluon.jit
def _slots(slots_ptr, b, rows):
    return gl.load(slots_ptr + b, mask=b < rows, other=0).to(gl.int32)


@gluon.jit
def _home(slot, stride):
    return (slot + _nothing()).to(gl.int64) * stride


@gluon.jit
def _state(ssm, slot, own, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """The state of eight rows, [8, channels, N]; rows that are not there have that of a slot that is."""
    ssm_ptr, stride = ssm
    first, count = own
    N: gl.constexpr = SIZES.N
    _, d, n = _indices_3d(8, SIZES.BLOCK_C, SIZES.BLOCK_N, LAYOUT)
    return gl.load(ssm_ptr + _home(slot, stride) + ((first + d) * N + n), mask=(d < count) & (n < N), other=0.0)


@gluon.jit
def _inputs_of_state(low_ptr, part, SIZES: gl.constexpr):
    """B and C of eight rows, [8, N] each."""
    N: gl.constexpr = SIZES.N
    LAYOUT: gl.constexpr = gl.SliceLayout(1, _layout_of_states(SIZES))
    b, n = _indices_2d(8, SIZES.BLOCK_N, LAYOUT)
    at = low_ptr + ((part * 8 + b) * (SIZES.R + 2 * N) + SIZES.R + n)
    mask = (n < N) & (b >= 0)
    b_ = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return b_, gl.load(at + N, mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def _keep_states(ssm, slots, moved, own, rows, SIZES: gl.constexpr):
    """Write back all rows' states."""
    LAYOUT: gl.constexpr = _layout_of_states(SIZES)
    N: gl.constexpr = SIZES.N
    ssm_ptr, stride = ssm
    first, count = own
    for part in gl.static_range(SIZES.BLOCK_B // 8):
        b, d, n = _indices_3d(8, SIZES.BLOCK_C, SIZES.BLOCK_N, LAYOUT)
        h_ptr = ssm_ptr + _home(slots[part], stride) + ((first + d) * N + n)
        mask = (d < count) & (n < N) & (part * 8 + b < rows)
        gl.store(h_ptr, moved[part].to(ssm_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _decay(weights, own, SIZES: gl.constexpr):
    """What states decay by, [8, channels, N], to the base of 2."""
    LAYOUT: gl.constexpr = _layout_of_states(SIZES)
    N: gl.constexpr = SIZES.N
    first, count = own
    _, d, n = _indices_3d(8, SIZES.BLOCK_C, SIZES.BLOCK_N, LAYOUT)
    decay_ptr = weights.decay.to(gl.pointer_type(gl.float32)) + first * N
    a_ptr = gl.multiple_of(decay_ptr + (d * N + n), [1, 1, 16])
    return gl.load(a_ptr, mask=(d < count) & (n < N), other=0.0) * LOG2_E


@gluon.jit
def _constants_of_channels(weights, own, SIZES: gl.constexpr):
    """dt_proj's bias, and what of x goes past the states."""
    LAYOUT: gl.constexpr = gl.SliceLayout(2, _layout_of_states(SIZES))
    first, count = own
    _, d = _indices_2d(8, SIZES.BLOCK_C, LAYOUT)
    dt_bias_ptr = _bf16(weights.dt_bias) + first
    dt_bias = gl.load(dt_bias_ptr + d, mask=d < count, other=0.0).to(gl.float32)
    skip_ptr = weights.skip.to(gl.pointer_type(SIZES.SKIP_DTYPE)) + first
    return dt_bias, gl.load(skip_ptr + d, mask=d < count, other=0.0).to(gl.float32)


@gluon.jit
def _gain(weights, own, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """That of the norm that follows, [tiles, 16, 1]."""
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    first, count = own
    tile, row, _ = _indices_3d(SIZES.O_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    next_gain_ptr = _bf16(weights.gain) + first
    return gl.load(next_gain_ptr + o, mask=(row < O_ROWS) & (o < count), other=0.0).to(gl.float32)


@gluon.jit
def _out_bias(bias_at, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """out_proj's, for rows that are there."""
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    first, count = own
    tile, row, b = _indices_3d(SIZES.O_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    bias_ptr = _bf16(bias_at) + first
    bias = gl.load(bias_ptr + o, mask=(row < O_ROWS) & (o < count), other=0.0)
    return gl.where(b < rows, bias.to(gl.float32), 0.0)


@gluon.jit
def _own_sums(sums, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """out_proj's sums, [tiles, 16, B]; what is not there is zero."""
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    O_SPACE: gl.constexpr = SIZES.O_SPACE
    OUTPUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    _, count = own
    tile, row, b = _indices_3d(O_SPACE, HIGH, SIZES.BLOCK_B, OUTPUT)
    mask = (row < O_ROWS) & (tile * O_ROWS + row < count) & (b < rows)
    return gl.where(mask, _total(sums, O_SPACE, LAYOUT, SIZES), 0.0)


@gluon.jit
def _squares(squares_ptr, SIZES: gl.constexpr):
    """Those of the residual, a share of each program for each of B."""
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    EACH: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_B, BLOCK_B // 4], [SIZES.WARPS, 1], [1, 0])
    p, b = _indices_2d(SIZES.P_SPACE, BLOCK_B, EACH)
    squares_at = squares_ptr + (p * (SIZES.GROUPS * BLOCK_B) + b)
    return gl.load(squares_at, mask=(p < SIZES.PROGRAMS) & (b >= 0), other=0.0, cache_modifier=".cg")


@gluon.jit
def _begin(begin, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """This program's part of the residual, the tokens' embeddings, [tiles, 16, B], and the gain of the first norm."""
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    first, count = own
    tile, row, b = _indices_3d(SIZES.O_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    mask = (row < O_ROWS) & (o < count)
    token = gl.load(begin.tokens + b, mask=b < rows, other=0)
    at = begin.embeddings + token * SIZES.H + (first + o)
    residual = gl.load(at, mask=mask & (b < rows), other=0.0).to(gl.float32)
    return residual, gl.load(begin.gain + first + o, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _tell(residual, gain, told, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """Write this program's part of the residual [tiles, 16, B] for all: with the gain of the norm, and its squares."""
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    first, count = own
    tile, row, b = _indices_3d(SIZES.O_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    mask = (row < O_ROWS) & (o < count) & (b < rows)
    gl.store(told.gained + (b * SIZES.H + first + o), (residual * gain).to(gl.bfloat16), mask=mask)
    square = gl.sum(gl.sum(residual * residual, axis=0), axis=0)
    b = gl.arange(0, SIZES.BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    gl.store(told.squares + gl.program_id(0) * (SIZES.GROUPS * SIZES.BLOCK_B) + b, square)
