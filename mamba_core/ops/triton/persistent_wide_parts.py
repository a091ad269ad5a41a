"""What ``persistent_wide_kernel`` does between its products besides the convolution: recurrence, residual."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.math import LOG2_E
from mamba_core.ops.triton.persistent import _bf16, _softplus
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d, _indices_3d, _nothing
from mamba_core.ops.triton.persistent_wide_tiles import QUARTERS, ROWS

# rows whose states a program moves on at a time
PART = gl.constexpr(8)


@gluon.jit
def _pairs(acc):
    """Even and odd columns of acc [64, WIDTH]."""
    WIDTH: gl.constexpr = acc.type.shape[1]
    return gl.split(gl.reshape(acc, [ROWS, WIDTH // 2, 2]))


@gluon.jit
def _home(slot, stride):
    return (slot + _nothing()).to(gl.int64) * stride


@gluon.jit
def _dt_like(COUNT: gl.constexpr):
    """What dt_proj's sums for so many channels are like."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, COUNT, 16])
    return _pairs(gl.zeros([ROWS, 2 * COUNT], gl.float32, MMA))[0]


@gluon.jit
def _bias(bias_at, first, like):
    """dt_proj's, of channels ``first`` on."""
    LAYOUT: gl.constexpr = like.type.layout
    COUNT: gl.constexpr = like.type.shape[1]
    _, c = _indices_2d(1, COUNT, LAYOUT)
    return gl.load(_bf16(bias_at) + first + c)


@gluon.jit
def _delta(acc, bias):
    """The step sizes [64, channels] of dt_proj's sums."""
    dt, _ = _pairs(acc)
    return _softplus(dt + bias.to(gl.float32))


@gluon.jit
def _slots(slots_ptr, part, rows, LAYOUT: gl.constexpr):
    b, _, _ = _indices_3d(PART, 1, 1, LAYOUT)
    return gl.load(slots_ptr + part * PART + b, mask=part * PART + b < rows, other=0).to(gl.int32)


@gluon.jit
def _state_at(ssm, slot, first, part, rows, COUNT: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the states of PART rows are, for COUNT channels from ``first`` on."""
    ssm_ptr, stride = ssm
    b, d, n = _indices_3d(PART, COUNT, N, LAYOUT)
    return ssm_ptr + _home(slot, stride) + ((first + d) * N + n), (part * PART + b < rows) & (d >= 0) & (n < N)


@gluon.jit
def _state(ssm, slot, first, part, rows, COUNT: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    home, mask = _state_at(ssm, slot, first, part, rows, COUNT, N, LAYOUT)
    return gl.load(home, mask=mask, other=0.0)


@gluon.jit
def _keep(ssm, slot, first, part, rows, moved, LAYOUT: gl.constexpr):
    """Write back the states of PART rows."""
    COUNT: gl.constexpr = moved.type.shape[1]
    N: gl.constexpr = moved.type.shape[2]
    home, mask = _state_at(ssm, slot, first, part, rows, COUNT, N, LAYOUT)
    gl.store(home, moved.to(home.dtype.element_ty), mask=mask)


@gluon.jit
def _inputs_of_state(low_ptr, part, R: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """B and C of PART rows."""
    b, n = _indices_2d(PART, N, LAYOUT)
    at = low_ptr + ((part * PART + b) * (R + 2 * N) + R + n)
    return gl.load(at, cache_modifier=".cg"), gl.load(at + N, cache_modifier=".cg")


@gluon.jit
def _constants_of_state(
    layer, first, COUNT: gl.constexpr, N: gl.constexpr, SKIP_DTYPE: gl.constexpr, LAYOUT: gl.constexpr
):
    _, d, n = _indices_3d(1, COUNT, N, LAYOUT)
    a = gl.load(layer.decay.to(gl.pointer_type(gl.float32)) + ((first + d) * N + n)) * LOG2_E
    _, d = _indices_2d(1, COUNT, gl.SliceLayout(2, LAYOUT))
    return a, gl.load(layer.skip.to(gl.pointer_type(SKIP_DTYPE)) + first + d).to(gl.float32)


@gluon.jit
def _moved(h, constants, inner, delta, x, gate):
    """The states of PART rows moved on, and y."""
    a, skip = constants
    b, c = inner
    x = x.to(gl.float32)
    h = gl.exp2(gl.expand_dims(delta, 2) * a) * h.to(gl.float32) + gl.expand_dims(delta * x, 2) * gl.expand_dims(b, 1)
    return h, (gl.sum(h * gl.expand_dims(c, 1), axis=2) + skip * x) * gate


@gluon.jit
def _own_rows(
    ptr,
    first_row,
    column,
    rows,
    STRIDE: gl.constexpr,
    OWN: gl.constexpr,
    COUNT: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Where this program's OWN rows of COUNT columns are, and which of them."""
    b, c = _indices_2d(OWN, COUNT, LAYOUT)
    return ptr + ((first_row + b) * STRIDE + column + c), (first_row + b < rows) & (c >= 0)


@gluon.jit
def _embedded(
    tokens_ptr,
    embeddings_ptr,
    first_row,
    column,
    rows,
    H: gl.constexpr,
    OWN: gl.constexpr,
    COUNT: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    b, c = _indices_2d(OWN, COUNT, LAYOUT)
    token = gl.load(tokens_ptr + first_row + b, mask=first_row + b < rows, other=0)
    mask = (first_row + b < rows) & (c >= 0)
    return gl.load(embeddings_ptr + token * H + (column + c), mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _gain(gain_ptr, column, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    _, c = _indices_2d(1, COUNT, LAYOUT)
    return gl.load(gain_ptr + column + c)


@gluon.jit
def _shared(
    parts_ptr,
    first_row,
    column,
    rows,
    H: gl.constexpr,
    OWN: gl.constexpr,
    COUNT: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """This program's part of out_proj: the sum of its shares."""
    total = gl.zeros([OWN, COUNT], gl.float32, LAYOUT)
    for i in gl.static_range(QUARTERS):
        at, mask = _own_rows(parts_ptr + i * (ROWS * H), first_row, column, rows, H, OWN, COUNT, LAYOUT)
        total += gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@gluon.jit
def _share(acc, part_ptr, column, rows, H: gl.constexpr):
    """Write a share of out_proj."""
    COUNT: gl.constexpr = acc.type.shape[1]
    LAYOUT: gl.constexpr = acc.type.layout
    b, c = _indices_2d(ROWS, COUNT, LAYOUT)
    gl.store(part_ptr + (b * H + column + c), acc, mask=(b < rows) & (c >= 0))


@gluon.jit
def _tell(residual, gain, gained_ptr, first_row, column, rows, H: gl.constexpr):
    """Write a part of the residual for all, with the gain of the norm; its squares [rows]."""
    OWN: gl.constexpr = residual.type.shape[0]
    COUNT: gl.constexpr = residual.type.shape[1]
    LAYOUT: gl.constexpr = residual.type.layout
    at, mask = _own_rows(gained_ptr, first_row, column, rows, H, OWN, COUNT, LAYOUT)
    gl.store(at, (residual * gain.to(gl.float32)).to(gl.bfloat16), mask=mask)
    return gl.sum(residual * residual, axis=1)
