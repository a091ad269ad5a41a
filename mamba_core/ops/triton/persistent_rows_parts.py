"""What a program of ``persistent_rows_kernel`` reads of its own, and how it begins and tells the others of its part."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.persistent_rows_tiles import HIGH, _indices_2d, _indices_3d, _nothing


@gluon.jit
def _slots(slots_ptr, b, rows):
    return gl.load(slots_ptr + b, mask=b < rows, other=0).to(gl.int32)


@gluon.jit
def _home(slot, stride):
    return (slot + _nothing()).to(gl.int64) * stride


@gluon.jit
def _state(
    ssm_ptr,
    slot,
    stride,
    first,
    count,
    N: gl.constexpr,
    BLOCK_C: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The state of eight rows, [8, channels, N]; rows that are not there have that of a slot that is."""
    _, d, n = _indices_3d(8, BLOCK_C, BLOCK_N, LAYOUT)
    return gl.load(ssm_ptr + _home(slot, stride) + ((first + d) * N + n), mask=(d < count) & (n < N), other=0.0)


@gluon.jit
def _inputs_of_state(low_ptr, part, R: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """B and C of eight rows, [8, N] each."""
    b, n = _indices_2d(8, BLOCK_N, LAYOUT)
    at = low_ptr + ((part * 8 + b) * (R + 2 * N) + R + n)
    mask = (n < N) & (b >= 0)
    b_ = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return b_, gl.load(at + N, mask=mask, other=0.0, cache_modifier=".cg")


@gluon.jit
def _begin(
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    first,
    count,
    rows,
    H: gl.constexpr,
    BLOCK_B: gl.constexpr,
    O_ROWS: gl.constexpr,
    O_SPACE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """This program's part of the residual, the tokens' embeddings, [tiles, 16, B], and the gain of the first norm."""
    tile, row, b = _indices_3d(O_SPACE, HIGH, BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    mask = (row < O_ROWS) & (o < count)
    token = gl.load(tokens_ptr + b, mask=b < rows, other=0)
    at = embeddings_ptr + token * H + (first + o)
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
    H: gl.constexpr,
    BLOCK_B: gl.constexpr,
    O_ROWS: gl.constexpr,
    O_SPACE: gl.constexpr,
    GROUPS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Write this program's part of the residual [tiles, 16, B] for all: with the gain of the norm, and its squares."""
    tile, row, b = _indices_3d(O_SPACE, HIGH, BLOCK_B, LAYOUT)
    o = tile * O_ROWS + row
    mask = (row < O_ROWS) & (o < count) & (b < rows)
    gl.store(gained_ptr + (b * H + first + o), (residual * gain).to(gl.bfloat16), mask=mask)
    square = gl.sum(gl.sum(residual * residual, axis=0), axis=0)
    b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    gl.store(squares_ptr + gl.program_id(0) * (GROUPS * BLOCK_B) + b, square)
