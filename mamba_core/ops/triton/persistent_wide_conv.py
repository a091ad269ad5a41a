"""The convolution of ``persistent_wide_kernel`` and ``persistent_narrow_kernel``, with what of the norm is left to it.

A program's channels come as a power of two and the rest, which may not be there: what is told of all of them is a tuple
of one tensor or two. x and z of a channel are neighbouring columns of in_proj's sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.persistent import _bf16, _sigmoid
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d
from mamba_core.ops.triton.persistent_wide_parts import _home, _pairs
from mamba_core.ops.triton.persistent_wide_tiles import ROWS


class Own(NamedTuple):
    """What is a program's own: the first of its channels, and the first row and column of its part of the residual."""

    channel: Any
    row: Any
    output: Any


@gluon.constexpr_function
def _counts(sizes):
    """How many channels each of the tensors has."""
    return (sizes.A // 2, sizes.B // 2) if sizes.B > 0 else (sizes.A // 2,)


@gluon.constexpr_function
def _one_thread_each(count):
    """Of what the convolution keeps: a quarter of the channels of one row, and each has one thread."""
    return gl.BlockedLayout([1, count // 4], [8, 4], [8, 1], [1, 0])


@gluon.constexpr_function
def _paired(count):
    """Of in_proj's sums for so many channels: x beside z."""
    return gl.BlockedLayout([1, 2], [32 // count, count], [8, 1], [1, 0])


@gluon.jit
def _like(COUNT: gl.constexpr):
    """What x is like, [64, COUNT]."""
    PAIRED: gl.constexpr = _paired(COUNT)
    return _pairs(gl.zeros([ROWS, 2 * COUNT], gl.float32, PAIRED))[0]


@gluon.jit
def _slots_of_window(slots_ptr, rows, COUNT: gl.constexpr):
    LAYOUT: gl.constexpr = _one_thread_each(COUNT)
    b, _ = _indices_2d(ROWS, 1, LAYOUT)
    return gl.load(slots_ptr + b, mask=b < rows, other=0).to(gl.int32)


@gluon.jit
def _slots_of_windows(slots_ptr, rows, SIZES: gl.constexpr):
    """The slots of all rows, as the threads need them that keep what the convolution needs."""
    COUNTS: gl.constexpr = _counts(SIZES)
    slots = ()
    for p in gl.static_range(len(COUNTS)):
        slots += (_slots_of_window(slots_ptr, rows, COUNTS[p]),)
    return slots


@gluon.jit
def _home_of_windows(conv, slots, own, p: gl.constexpr, rows, SIZES: gl.constexpr):
    """Where the oldest inputs are that the convolution keeps, of every row and the channels of the p-th tensors."""
    COUNTS: gl.constexpr = _counts(SIZES)
    COUNT: gl.constexpr = COUNTS[p]
    LAYOUT: gl.constexpr = _one_thread_each(COUNT)
    conv_ptr, stride = conv
    first = own.channel + p * (SIZES.A // 2)
    b, c = _indices_2d(ROWS, COUNT, LAYOUT)
    home = conv_ptr + _home(slots[p], stride) + (first + c) * (1 if SIZES.TAP_MAJOR else SIZES.K - 1)
    return home, gl.max_constancy((b < rows) & (c >= 0), [1, COUNT])


@gluon.jit
def _read_windows(conv, slots, own, rows, SIZES: gl.constexpr):
    """The K - 1 inputs that the convolution keeps."""
    COUNTS: gl.constexpr = _counts(SIZES)
    windows = ()
    for p in gl.static_range(len(COUNTS)):
        home, mask = _home_of_windows(conv, slots, own, p, rows, SIZES)
        columns = ()
        for j in gl.static_range(SIZES.K - 1):
            columns += (gl.load(home + j * (SIZES.D if SIZES.TAP_MAJOR else 1), mask=mask, other=0.0),)
        windows += (columns,)
    return windows


@gluon.jit
def _recall(columns, layer, own, p: gl.constexpr, SIZES: gl.constexpr):
    """What the convolution's past adds up to, and the weights of what comes newest."""
    COUNTS: gl.constexpr = _counts(SIZES)
    K: gl.constexpr = SIZES.K
    like = _like(COUNTS[p])
    LAYOUT: gl.constexpr = like.type.layout
    first = own.channel + p * (SIZES.A // 2)
    _, c = _indices_2d(1, COUNTS[p], LAYOUT)
    taps_ptr = _bf16(layer.taps) + (first + c) * K
    past = gl.zeros_like(like)
    if SIZES.HAS_CONV_BIAS:
        past += gl.load(_bf16(layer.conv_bias) + (first + c)).to(gl.float32)
    for j in gl.static_range(K - 1):
        old = gl.convert_layout(columns[j], LAYOUT)
        past += old.to(gl.float32) * gl.load(taps_ptr + j).to(gl.float32)
    return past, gl.load(taps_ptr + K - 1).to(gl.float32)


@gluon.jit
def _recall_and_move_on(conv, slots, windows, layer, own, rows, SIZES: gl.constexpr):
    """What ``_recall`` makes of the past, which is moved on, but for what is not known yet."""
    recalled = ()
    COUNTS: gl.constexpr = _counts(SIZES)
    for p in gl.static_range(len(COUNTS)):
        recalled += (_recall(windows[p], layer, own, p, SIZES),)
        home, mask = _home_of_windows(conv, slots, own, p, rows, SIZES)
        for j in gl.static_range(1, SIZES.K - 1):
            gl.store(home + (j - 1) * (SIZES.D if SIZES.TAP_MAJOR else 1), windows[p][j], mask=mask)
    return recalled


@gluon.jit
def _scale(squares, eps, COUNT: gl.constexpr, H: gl.constexpr):
    like = _like(COUNT)
    ROW: gl.constexpr = gl.SliceLayout(1, like.type.layout)
    return gl.convert_layout(1.0 / gl.sqrt(gl.sum(squares, axis=0) / H + eps), ROW)[:, None]


@gluon.jit
def _scales(squares, eps, SIZES: gl.constexpr):
    """The norm's [64, 1], of squares [groups, 64]."""
    COUNTS: gl.constexpr = _counts(SIZES)
    scales = ()
    for p in gl.static_range(len(COUNTS)):
        scales += (_scale(squares, eps, COUNTS[p], SIZES.H),)
    return scales


@gluon.jit
def _convolve(sums, scale, recalled, DTYPE: gl.constexpr):
    """x after its convolution, the gate of z, and the newest input, of in_proj's sums before their norm."""
    PAIRED: gl.constexpr = _paired(sums.type.shape[1] // 2)
    x, z = _pairs(sums.load(PAIRED))
    past, taps = recalled
    newest = (x * scale).to(DTYPE).to(gl.float32)
    x = past + newest * taps
    z = z * scale
    return (x * _sigmoid(x)).to(gl.bfloat16), z * _sigmoid(z), newest


@gluon.jit
def _write_newest(home, mask, newest, SIZES: gl.constexpr):
    """Write the newest inputs where the ones before them were."""
    step = (SIZES.K - 2) * (SIZES.D if SIZES.TAP_MAJOR else 1)
    gl.store(home + step, newest.to(home.dtype.element_ty), mask=mask)


@gluon.jit
def _keep_newest(conv, slots, newest, own, rows, SIZES: gl.constexpr):
    """The same for all of the program's channels."""
    COUNTS: gl.constexpr = _counts(SIZES)
    for p in gl.static_range(len(COUNTS)):
        home, mask = _home_of_windows(conv, slots, own, p, rows, SIZES)
        _write_newest(home, mask, newest[p], SIZES)
