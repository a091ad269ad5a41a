"""Depthwise causal convolution with SiLU, forward: Triton kernels.

The first K-1 tokens of a sequence, whose windows reach into its state, are a matter of their own, its head: a program
per sequence and channel block works on them and on the state, others on all further tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mamba_core.ops.triton.math import LOG2_E, sigmoid


@triton.jit
def at_home(state_ptr, slot, d, dim, K: tl.constexpr, TAP_MAJOR: tl.constexpr):
    """Where the oldest inputs of channels d lie in a slot that begins at ``slot``, and how far apart the taps are."""
    if TAP_MAJOR:
        return state_ptr + slot + d, dim
    else:  # noqa: RET505  what is not there must not be compiled
        return state_ptr + slot + d * (K - 1), 1


@triton.jit
def _silu(v):
    # the square of a reciprocal square root: one instruction and a product where a division takes six
    root = tl.rsqrt(1.0 + tl.exp2(v * -LOG2_E))
    return v * root * root


@triton.jit(do_not_specialize=["slots_ptr", "num_tokens", "num_rows"])
def conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    seq_idx_ptr,
    cu_seqlens_ptr,
    num_tokens,
    num_rows,
    dim,
    x_stride,
    y_stride,
    state_stride,
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STRIPS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Everything in one launch: the first ``num_rows`` programs do the heads, the others STRIPS * STRIP tokens each."""
    program = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < dim
    weights = ()
    for k in tl.static_range(K):
        weights += (tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32),)
    bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    if program < num_rows:
        row = program.to(tl.int64)
        begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64) - begin
        home, tap_stride = at_home(state_ptr, tl.load(slots_ptr + row) * state_stride, d, dim, K, TAP_MAJOR)
        x_ptr += begin * x_stride
        y_ptr += begin * y_stride
        _head(x_ptr, y_ptr, home, tap_stride, weights, bias, d, dim, length, x_stride, y_stride, K)
    else:
        first = (program - num_rows).to(tl.int64) * (STRIPS * STRIP) + tl.arange(0, STRIPS) * STRIP
        _strips(x_ptr, y_ptr, seq_idx_ptr, weights, bias, d, mask_d, first, num_tokens, x_stride, y_stride, K, STRIP)


@triton.jit
def _strips(
    x_ptr,
    y_ptr,
    seq_idx_ptr,
    weights,
    bias,
    d,
    mask_d,
    first,
    num_tokens,
    x_stride,
    y_stride,
    K: tl.constexpr,
    STRIP: tl.constexpr,
):
    """STRIP tokens from each of ``first`` on, every input read once, except those of heads."""
    inputs = ()
    rows = ()
    for i in tl.static_range(1 - K, STRIP):
        t = first + i
        is_token = (t >= 0) & (t < num_tokens)
        inputs += (
            tl.load(x_ptr + t[:, None] * x_stride + d[None, :], mask=is_token[:, None] & mask_d[None, :], other=0.0),
        )
        rows += (tl.load(seq_idx_ptr + t, mask=is_token, other=-1),)
    for i in tl.static_range(STRIP):
        acc = tl.zeros_like(inputs[0]).to(tl.float32) + bias[None, :]
        for k in tl.static_range(K):
            acc += inputs[i + k].to(tl.float32) * weights[k][None, :]
        whole_window = (rows[i] == rows[i + K - 1]) & (rows[i] >= 0)
        y_ptrs = y_ptr + (first + i)[:, None] * y_stride + d[None, :]
        tl.store(y_ptrs, _silu(acc).to(y_ptr.dtype.element_ty), mask=whole_window[:, None] & mask_d[None, :])


@triton.jit
def _head(x_ptr, y_ptr, home, tap_stride, weights, bias, d, dim, length, x_stride, y_stride, K: tl.constexpr):
    """The first K-1 outputs of one sequence, then its new state; an empty sequence leaves its slot alone."""
    state_type: tl.constexpr = home.dtype.element_ty
    some = d < tl.where(length > 0, dim, 0)
    old = ()
    for k in tl.static_range(K - 1):
        old += (tl.load(home + k * tap_stride, mask=some, other=0.0),)
    inputs = ()
    for k in tl.static_range(K - 1):
        inputs += (old[k].to(x_ptr.dtype.element_ty).to(tl.float32),)
    for j in tl.static_range(K - 1):
        live = d < tl.where(j < length, dim, 0)
        inputs += (tl.load(x_ptr + j * x_stride + d, mask=live, other=0.0).to(tl.float32),)
        acc = bias
        for k in tl.static_range(K):
            acc += inputs[j + k] * weights[k]
        tl.store(y_ptr + j * y_stride + d, _silu(acc).to(y_ptr.dtype.element_ty), mask=live)
    new = ()
    for j in tl.static_range(K - 1):
        position = length + j
        is_new = d < tl.where((length > 0) & (position >= K - 1), dim, 0)
        value = tl.load(x_ptr + (position - (K - 1)) * x_stride + d, mask=is_new, other=0.0).to(state_type)
        for k in tl.static_range(K - 1):
            value = tl.where(position == k, old[k], value)
        new += (value,)
    # no thread may overwrite what another has yet to read
    tl.debug_barrier()
    for j in tl.static_range(K - 1):
        tl.store(home + j * tap_stride, new[j], mask=some)


@triton.jit
def _weights_of(weights, tap_index, k):
    """Those of tap k, of weights [BLOCK_D, BLOCK_K] that were read at once."""
    return tl.sum(tl.where((tap_index == k)[None, :], weights, 0.0), axis=1)[None, :]


@triton.jit(do_not_specialize=["slots_ptr", "num_rows"])
def conv_step_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    num_rows,
    dim,
    x_stride,
    y_stride,
    state_stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token of each row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tap_index = tl.arange(0, BLOCK_K)
    mask_b, mask_d = row < num_rows, d < dim
    mask = mask_b[:, None] & mask_d[None, :]
    slots = tl.load(slots_ptr + row, mask=mask_b, other=0)
    weight_ptrs = weight_ptr + d[:, None] * K + tap_index[None, :]
    weights = tl.load(weight_ptrs, mask=mask_d[:, None] & (tap_index < K)[None, :], other=0.0).to(tl.float32)
    home, tap_stride = at_home(state_ptr, slots[:, None] * state_stride, d[None, :], dim, K, TAP_MAJOR)
    columns = ()
    for k in tl.static_range(K - 1):
        columns += (tl.load(home + k * tap_stride, mask=mask, other=0.0),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row[:, None] * x_stride + d[None, :], mask=mask, other=0.0)
    acc = x.to(tl.float32) * _weights_of(weights, tap_index, K - 1)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K - 1):
        acc += columns[k].to(x_ptr.dtype.element_ty).to(tl.float32) * _weights_of(weights, tap_index, k)
    # no thread may overwrite what another has yet to read
    tl.debug_barrier()
    for k in tl.static_range(1, K - 1):
        tl.store(home + (k - 1) * tap_stride, columns[k], mask=mask)
    tl.store(home + (K - 2) * tap_stride, x.to(state_ptr.dtype.element_ty), mask=mask)
    y = acc * sigmoid(acc)
    tl.store(y_ptr + row[:, None] * y_stride + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
