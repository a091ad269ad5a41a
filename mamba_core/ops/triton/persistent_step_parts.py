"""What a program of ``persistent_step_kernel`` does between its products, with what is its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.math import LOG2_E
from mamba_core.ops.triton.persistent import (
    CONV_BIAS,
    DECAY,
    DT_BIAS,
    DT_PROJ,
    GAIN,
    IN_BIAS,
    IN_SCALES,
    OUT_BIAS,
    OUT_SCALES,
    SKIP,
    TAPS,
    X_SCALES,
    _barrier,
    _bf16,
    _sigmoid,
    _softplus,
)


class Told(NamedTuple):
    """Where programs tell each other what they have made: pointers to the rooms that the kernel is given."""

    x: Any
    low: Any
    y: Any
    gained: Any
    squares: Any


class Products(NamedTuple):
    """One of something for each product: the halves of in_proj, x_proj, out_proj."""

    x: Any
    z: Any
    low: Any
    out: Any


class Own(NamedTuple):
    """Rows of a product that are a program's own: the first, how many, their numbers, and which of those are there."""

    first: Any
    count: Any
    index: Any
    mask: Any


class Weights(NamedTuple):
    """Pointers to what is small of a layer and a program's own, with the gain of the norm that follows."""

    taps: Any
    conv_bias: Any
    dt: Any
    dt_bias: Any
    decay: Any
    skip: Any
    gain: Any


@gluon.constexpr_function
def _layout_of_state(warps):
    """[channels, N]."""
    return gl.BlockedLayout([1, 4], [8, 4], [warps, 1], [1, 0])


@gluon.jit
def _own(share, SPACE: gl.constexpr, LAYOUT: gl.constexpr):
    first, count = share
    index = gl.arange(0, SPACE, layout=LAYOUT)
    return Own(first, count, index, index < count)


@gluon.jit
def _own_state(channels, SIZES: gl.constexpr):
    """Where the state of these channels is among that of all, and which of its elements are there."""
    LAYOUT: gl.constexpr = _layout_of_state(SIZES.WARPS)
    n = gl.arange(0, SIZES.BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    mask_n = n < SIZES.N
    tile = (channels.first + channels.index)[:, None] * SIZES.N + n[None, :]
    return tile, channels.mask[:, None] & mask_n[None, :]


@gluon.jit
def _own_weights(entry, channels, state_channels, tile, outputs, SIZES: gl.constexpr):
    first, d = state_channels.first, state_channels.index
    return Weights(
        _bf16(gl.load(entry + TAPS)) + (first + channels.index) * SIZES.K,
        _bf16(gl.load(entry + CONV_BIAS)) + first + channels.index,
        _bf16(gl.load(entry + DT_PROJ)) + first * SIZES.R,
        _bf16(gl.load(entry + DT_BIAS)) + first + d,
        gl.load(entry + DECAY).to(gl.pointer_type(gl.float32)) + tile,
        gl.load(entry + SKIP).to(gl.pointer_type(SIZES.SKIP_DTYPE)) + first + d,
        _bf16(gl.load(entry + GAIN)) + outputs.first + outputs.index,
    )


@gluon.jit
def _scale_of(entry, rows, mask, IS_INT8: gl.constexpr):
    """What sums of these rows of a product are to be multiplied with; ``entry`` holds the address of the scales."""
    if IS_INT8:
        return gl.load(gl.load(entry).to(gl.pointer_type(gl.float32)) + rows, mask=mask, other=0.0)
    else:  # noqa: RET505  what is not there must not be compiled
        return 1.0


@gluon.jit
def _scales(entry, channels, lows, outputs, SIZES: gl.constexpr):
    """The same for all products."""
    IS_INT8: gl.constexpr = gl.int8 == SIZES.WEIGHT_DTYPE
    return Products(
        _scale_of(entry + IN_SCALES, channels.first + channels.index, channels.mask, IS_INT8),
        _scale_of(entry + IN_SCALES, SIZES.D + channels.first + channels.index, channels.mask, IS_INT8),
        _scale_of(entry + X_SCALES, lows.first + lows.index, lows.index < lows.count, IS_INT8),
        _scale_of(entry + OUT_SCALES, outputs.first + outputs.index, outputs.mask, IS_INT8),
    )


@gluon.jit
def _begin(begin, token, told, outputs, H: gl.constexpr):
    """This program's part of the residual, the token's embedding, told with the gain of the first norm."""
    _, embeddings_ptr, gain_ptr = begin
    first, _, o, mask = outputs
    residual = gl.load(embeddings_ptr + token * H + first + o, mask=mask, other=0.0).to(gl.float32)
    gain = gl.load(gain_ptr + first + o, mask=mask, other=0.0).to(gl.float32)
    _tell(residual, gain, told, outputs)
    return residual


@gluon.jit
def _tell(residual, gain, told, outputs):
    """Write this program's part of the residual for all: with the gain of the norm, and its squares."""
    first, _, o, mask = outputs
    gl.store(told.gained + first + o, (residual * gain).to(gl.bfloat16), mask=mask)
    gl.store(told.squares + gl.program_id(0), gl.sum(residual * residual, axis=0))


@gluon.jit
def _past(window_ptr, weights, mask, SIZES: gl.constexpr):
    """The convolution but for its newest inputs, their taps, and the columns of the window."""
    K: gl.constexpr = SIZES.K
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    CHANNEL: gl.constexpr = mask.type.layout
    past = gl.zeros([BLOCK_C], gl.float32, CHANNEL)
    if SIZES.HAS_CONV_BIAS:
        past += gl.load(weights.conv_bias, mask=mask, other=0.0).to(gl.float32)
    columns = ()
    for j in gl.static_range(K - 1):
        old = gl.load(window_ptr + j * (SIZES.D if SIZES.TAP_MAJOR else 1), mask=mask, other=0.0)
        past += old.to(gl.float32) * gl.load(weights.taps + j, mask=mask, other=0.0).to(gl.float32)
        columns += (old,)
    newest = gl.load(weights.taps + K - 1, mask=mask, other=0.0).to(gl.float32)
    return past, newest, columns


@gluon.jit
def _biases(entry, channels, outputs, D: gl.constexpr):
    """in_proj's, of x and of the gate, and out_proj's."""
    in_bias_ptr = _bf16(gl.load(entry + IN_BIAS)) + channels.first + channels.index
    x_bias = gl.load(in_bias_ptr, mask=channels.mask, other=0.0).to(gl.float32)
    z_bias = gl.load(in_bias_ptr + D, mask=channels.mask, other=0.0).to(gl.float32)
    out_bias_ptr = _bf16(gl.load(entry + OUT_BIAS)) + outputs.first + outputs.index
    return x_bias, z_bias, gl.load(out_bias_ptr, mask=outputs.mask, other=0.0).to(gl.float32)


@gluon.jit
def _convolve(x, window_ptr, recalled, mask, SIZES: gl.constexpr):
    """x after its convolution; the window is moved on."""
    past, newest, columns = recalled
    TAP_STRIDE: gl.constexpr = SIZES.D if SIZES.TAP_MAJOR else 1
    kept = x.to(window_ptr.dtype.element_ty)
    # every thread has read what was there, also one that holds an element beside others
    _barrier()
    for j in gl.static_range(1, SIZES.K - 1):
        gl.store(window_ptr + (j - 1) * TAP_STRIDE, columns[j], mask=mask)
    gl.store(window_ptr + (SIZES.K - 2) * TAP_STRIDE, kept, mask=mask)
    x = past + kept.to(gl.float32) * newest
    return (x * _sigmoid(x)).to(gl.bfloat16)


@gluon.jit
def _dt_places(SIZES: gl.constexpr):
    """Of R_HIGH columns of dt_proj, and of R_LOW that follow: rows [channels, 1] and columns."""
    HIGH: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [SIZES.WARPS, 1], [1, 0])
    LOW: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [SIZES.WARPS, 1], [1, 0])
    high_d = gl.arange(0, SIZES.BLOCK_C, layout=gl.SliceLayout(1, HIGH))[:, None]
    places = ((high_d, gl.arange(0, SIZES.R_HIGH, layout=gl.SliceLayout(0, HIGH))),)
    if SIZES.R_LOW > 0:
        low_d = gl.arange(0, SIZES.BLOCK_C, layout=gl.SliceLayout(1, LOW))[:, None]
        places += ((low_d, SIZES.R_HIGH + gl.arange(0, SIZES.R_LOW, layout=gl.SliceLayout(0, LOW))),)
    return places


@gluon.jit
def _dt_weights(dt_ptr, count, places, SIZES: gl.constexpr):
    """dt_proj of this program's channels, in one or two pieces."""
    R: gl.constexpr = SIZES.R
    d, r = places[0]
    w = (gl.load(gl.multiple_of(dt_ptr + d * R + r[None, :], [1, 16]), mask=d < count, other=0.0),)
    if SIZES.R_LOW > 0:
        d, r = places[1]
        mask = (d < count) & (r < R)[None, :]
        w += (gl.load(gl.multiple_of(dt_ptr + d * R + r[None, :], [1, 16]), mask=mask, other=0.0),)
    return w


@gluon.jit
def _constants_of_state(weights, channels, mask, places, SIZES: gl.constexpr):
    """dt_proj with its bias, what the state decays by to the base of 2, and what of x goes past it."""
    w = _dt_weights(weights.dt, channels.count, places, SIZES)
    dt_bias = gl.load(weights.dt_bias, mask=channels.mask, other=0.0).to(gl.float32)
    a = gl.load(weights.decay, mask=mask, other=0.0) * LOG2_E
    return w, dt_bias, a, gl.load(weights.skip, mask=channels.mask, other=0.0).to(gl.float32)


@gluon.jit
def _advance_state(h, x, z, low_ptr, constants, places, inner_eps, SIZES: gl.constexpr):
    """dt_proj and the recurrence: the state moved on, and y. z: before it gates."""
    R: gl.constexpr = SIZES.R
    N: gl.constexpr = SIZES.N
    STATE: gl.constexpr = _layout_of_state(SIZES.WARPS)
    CHANNEL: gl.constexpr = gl.SliceLayout(1, STATE)
    w, dt_bias, a, skip = constants
    n = gl.arange(0, SIZES.BLOCK_N, layout=gl.SliceLayout(0, STATE))
    _, r = places[0]
    low = gl.load(low_ptr + r, cache_modifier=".cg")
    b = gl.load(low_ptr + R + n, mask=n < N, other=0.0, cache_modifier=".cg")
    c = gl.load(low_ptr + R + N + n, mask=n < N, other=0.0, cache_modifier=".cg")
    power = gl.sum(low * low, axis=0)
    dt = gl.convert_layout(gl.sum(w[0].to(gl.float32) * low[None, :], axis=1), CHANNEL)
    if SIZES.R_LOW > 0:
        _, r = places[1]
        low = gl.load(low_ptr + r, mask=r < R, other=0.0, cache_modifier=".cg")
        power += gl.sum(low * low, axis=0)
        dt += gl.convert_layout(gl.sum(w[1].to(gl.float32) * low[None, :], axis=1), CHANNEL)
    if SIZES.NORM:
        dt = dt / gl.sqrt(power / R + inner_eps)
        b = b / gl.sqrt(gl.sum(b * b, axis=0) / N + inner_eps)
        c = c / gl.sqrt(gl.sum(c * c, axis=0) / N + inner_eps)
    delta = _softplus(dt + dt_bias)
    x = x.load(CHANNEL)
    h = gl.exp2(delta[:, None] * a) * h + (delta * x)[:, None] * b[None, :]
    y = gl.sum(h * c[None, :], axis=1) + skip * x
    return h, y * (z * _sigmoid(z))
