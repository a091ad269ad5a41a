"""What a program of ``persistent_rows_kernel`` reads of its own, and what it tells the others of the residual."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.persistent import _bf16
from mamba_core.ops.triton.persistent_rows_tiles import HIGH, _indices_2d, _indices_3d, _nothing


@gluon.jit
def _slots(slots_ptr, b, rows):
    return gl.load(slots_ptr + b, mask=b < rows, other=0).to(gl.int32)


@gluon.jit
def _home(slot, stride):
    return (slot + _nothing()).to(gl.int64) * stride


@gluon.jit
def _state(ssm, slot, first, count, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """The state of eight rows, [8, channels, N]; rows that are not there have that of a slot that is."""
    ssm_ptr, stride = ssm
    N: gl.constexpr = SIZES.N
    _, d, n = _indices_3d(8, SIZES.BLOCK_C, SIZES.BLOCK_N, LAYOUT)
    return gl.load(ssm_ptr + _home(slot, stride) + ((first + d) * N + n), mask=(d < count) & (n < N), other=0.0)


@gluon.jit
def _inputs_of_state(low_ptr, part, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """B and C of eight rows, [8, N] each."""
    N: gl.constexpr = SIZES.N
    b, n = _indices_2d(8, SIZES.BLOCK_N, LAYOUT)
    at = low_ptr + ((part * 8 + b) * (SIZES.R + 2 * N) + SIZES.R + n)
    mask = (n < N) & (b >= 0)
    b_ = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return b_, gl.load(at + N, mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def _window_at(conv, slot, c, SIZES: gl.constexpr):
    """Where the oldest inputs are that the convolution of channels c keeps, and how far apart the taps are."""
    conv_ptr, stride = conv
    D: gl.constexpr = SIZES.D
    K: gl.constexpr = SIZES.K
    home = conv_ptr + _home(slot, stride)
    if SIZES.TAP_MAJOR:
        return home + c, D
    else:  # noqa: RET505  what is not there must not be compiled
        return home + c * (K - 1), 1


@gluon.jit
def _small(weights_at, conv, slot, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """Of the convolution: the window of this program's channels, the taps and the bias, [tiles, 16, B] each."""
    taps_at, conv_bias_at = weights_at
    first, count = own
    K: gl.constexpr = SIZES.K
    C_SPACE: gl.constexpr = SIZES.BLOCK_C // HIGH
    tile, row, b = _indices_3d(C_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    c = tile * HIGH + row
    mask = c < count
    taps_ptr = _bf16(taps_at) + (first + c) * K
    window_ptr, TAP_STRIDE = _window_at(conv, slot, first + c, SIZES)
    small = ()
    for j in gl.static_range(K - 1):
        small += (gl.load(window_ptr + j * TAP_STRIDE, mask=mask & (b < rows), other=0.0),)
    for j in gl.static_range(K):
        small += (gl.load(taps_ptr + j, mask=mask, other=0.0),)
    if SIZES.HAS_CONV_BIAS:
        small += (gl.load(_bf16(conv_bias_at) + (first + c), mask=mask, other=0.0),)
    return small


@gluon.jit
def _past(weights_at, conv, slot, own, rows, LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """The same, weighed: the convolution but for its newest inputs, their taps, and the columns of the window."""
    taps_at, conv_bias_at = weights_at
    first, count = own
    K: gl.constexpr = SIZES.K
    C_SPACE: gl.constexpr = SIZES.BLOCK_C // HIGH
    tile, row, b = _indices_3d(C_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    c = tile * HIGH + row
    mask = c < count
    taps_ptr = _bf16(taps_at) + (first + c) * K
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    past = gl.zeros([C_SPACE, HIGH, BLOCK_B], gl.float32, LAYOUT)
    if SIZES.HAS_CONV_BIAS:
        conv_bias_ptr = _bf16(conv_bias_at) + first
        past += gl.load(conv_bias_ptr + c, mask=mask, other=0.0).to(gl.float32)
    window_ptr, TAP_STRIDE = _window_at(conv, slot, first + c, SIZES)
    columns = ()
    for j in gl.static_range(K - 1):
        old = gl.load(window_ptr + j * TAP_STRIDE, mask=mask & (b < rows), other=0.0)
        past += old.to(gl.float32) * gl.load(taps_ptr + j, mask=mask, other=0.0).to(gl.float32)
        columns += (old,)
    newest = gl.load(taps_ptr + K - 1, mask=mask, other=0.0).to(gl.float32)
    return past, newest, columns


@gluon.jit
def _begin(
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    first,
    count,
    rows,
    LAYOUT: gl.constexpr,
    SIZES: gl.constexpr,
):
    """This program's part of the residual, the tokens' embeddings, [tiles, 16, B], and the gain of the first norm."""
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    tile, row, b = _indices_3d(SIZES.O_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    mask = (row < O_ROWS) & (o < count)
    token = gl.load(tokens_ptr + b, mask=b < rows, other=0)
    at = embeddings_ptr + token * SIZES.H + (first + o)
    residual = gl.load(at, mask=mask & (b < rows), other=0.0).to(gl.float32)
    return residual, gl.load(gain_ptr + first + o, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _tell(
    residual,
    gain,
    gained_ptr,
    squares_ptr,
    first,
    count,
    rows,
    LAYOUT: gl.constexpr,
    SIZES: gl.constexpr,
):
    """Write this program's part of the residual [tiles, 16, B] for all: with the gain of the norm, and its squares."""
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    tile, row, b = _indices_3d(SIZES.O_SPACE, HIGH, SIZES.BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    mask = (row < O_ROWS) & (o < count) & (b < rows)
    gl.store(gained_ptr + (b * SIZES.H + first + o), (residual * gain).to(gl.bfloat16), mask=mask)
    square = gl.sum(gl.sum(residual * residual, axis=0), axis=0)
    b = gl.arange(0, SIZES.BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    gl.store(squares_ptr + gl.program_id(0) * (SIZES.GROUPS * SIZES.BLOCK_B) + b, square)
