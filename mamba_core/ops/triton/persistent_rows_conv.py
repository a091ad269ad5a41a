"""The convolution of ``persistent_rows_kernel``, with what of the norm is left to it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.persistent import CONV_BIAS, TAPS, _bf16, _sigmoid, _view
from mamba_core.ops.triton.persistent_rows_parts import _home, _layout_of_sums
from mamba_core.ops.triton.persistent_rows_tiles import HIGH, _indices_3d


@gluon.constexpr_function
def _channels(sizes):
    """[tiles, 16, B] of this program's channels."""
    return gl.SliceLayout(1, _layout_of_sums(sizes.BLOCK_C // 16, sizes.BLOCK_B, sizes.WARPS))


@gluon.jit
def _own_places(own, SIZES: gl.constexpr):
    """This program's channels, the rows, and which of the channels are there: [tiles, 16, 1], [1, 1, B]."""
    LAYOUT: gl.constexpr = _channels(SIZES)
    _, count = own
    tile, row, b = _indices_3d(SIZES.BLOCK_C // HIGH, HIGH, SIZES.BLOCK_B, LAYOUT)
    c = tile * HIGH + row
    return c, b, c < count


@gluon.jit
def _weights_of_conv(entry):
    """Addresses of the taps and of the bias."""
    return gl.load(entry + TAPS), gl.load(entry + CONV_BIAS)


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
def _small(weights_at, conv, slot, own, rows, SIZES: gl.constexpr):
    """Of the convolution: the window of this program's channels, the taps and the bias, [tiles, 16, B] each."""
    taps_at, conv_bias_at = weights_at
    first, _ = own
    K: gl.constexpr = SIZES.K
    c, b, mask = _own_places(own, SIZES)
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
def _past(weights_at, conv, slot, own, rows, SIZES: gl.constexpr):
    """The same, weighed: the convolution but for its newest inputs, their taps, and the columns of the window."""
    LAYOUT: gl.constexpr = _channels(SIZES)
    taps_at, conv_bias_at = weights_at
    first, _ = own
    K: gl.constexpr = SIZES.K
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    C_SPACE: gl.constexpr = SIZES.BLOCK_C // HIGH
    c, b, mask = _own_places(own, SIZES)
    taps_ptr = _bf16(taps_at) + (first + c) * K
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
def _in_biases(bias_at, own, SIZES: gl.constexpr):
    """in_proj's, of x and of the gate."""
    first, _ = own
    c, _, mask = _own_places(own, SIZES)
    bias_ptr = _bf16(bias_at) + first
    x_bias = gl.load(bias_ptr + c, mask=mask, other=0.0).to(gl.float32)
    return x_bias, gl.load(bias_ptr + SIZES.D + c, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _scale(squares, eps, SIZES: gl.constexpr):
    """The norm's [1, 1, B], of squares [programs, B]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, _channels(SIZES)))
    scale = 1.0 / gl.sqrt(gl.sum(squares, axis=0) / SIZES.H + eps)
    return gl.convert_layout(scale, LAYOUT)[None, None, :]


@gluon.jit
def _convolve(small, new, SIZES: gl.constexpr):
    """x of what ``_small`` read and of the newest inputs."""
    K: gl.constexpr = SIZES.K
    x = new.to(gl.float32) * small[2 * K - 2].to(gl.float32)
    for j in gl.static_range(K - 1):
        x += small[j].to(gl.float32) * small[K - 1 + j].to(gl.float32)
    if SIZES.HAS_CONV_BIAS:
        x += small[2 * K - 1].to(gl.float32)
    return x


@gluon.jit
def _keep_x(x, x_kept, own, rows, SIZES: gl.constexpr):
    """SiLU of x, kept; as what x_proj is multiplied with."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    BLOCKS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[SIZES.WARPS, 1], instr_shape=[16, 8]
    )
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    C_SPACE: gl.constexpr = SIZES.BLOCK_C // HIGH
    # other programs' channels, and sums of tiles that are not there, may be anything but must count as zero
    _, b, mask = _own_places(own, SIZES)
    x = gl.where(mask & (b < rows), x * _sigmoid(x), 0.0).to(gl.bfloat16)
    _view(x_kept, gl.bfloat16, [BLOCK_B, C_SPACE, HIGH], FLAT).permute((1, 2, 0)).store(x)
    return x_kept.permute((1, 0)).load(gl.DotOperandLayout(1, BLOCKS, 8))


@gluon.jit
def _move_on(conv, slot, columns, new, own, rows, SIZES: gl.constexpr):
    """Move the windows of this program's channels on."""
    first, _ = own
    c, b, mask = _own_places(own, SIZES)
    mask = mask & (b < rows)
    window_ptr, TAP_STRIDE = _window_at(conv, slot, first + c, SIZES)
    for j in gl.static_range(1, SIZES.K - 1):
        gl.store(window_ptr + (j - 1) * TAP_STRIDE, columns[j], mask=mask)
    gl.store(window_ptr + (SIZES.K - 2) * TAP_STRIDE, new, mask=mask)
