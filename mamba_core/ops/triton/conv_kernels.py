"""Depthwise causal convolution with SiLU, forward: Triton kernels.

The first K-1 tokens of a sequence, whose windows reach into its state, are a matter of their own: the kernels named
``head`` work on them and on the state, one program per sequence and channel block, the others on all further tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.math import sigmoid


@triton.jit(do_not_specialize=["num_tokens"])
def conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    seq_idx_ptr,
    cu_seqlens_ptr,
    num_tokens,
    dim,
    x_stride,
    y_stride,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < dim
    row = tl.load(seq_idx_ptr + t, mask=t < num_tokens, other=0)
    begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    mask = ((t < num_tokens) & (t - begin >= K - 1))[:, None] & mask_d[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
        tap = tl.load(x_ptr + (t - (K - 1 - k))[:, None] * x_stride + d[None, :], mask=mask, other=0.0)
        acc += tap.to(tl.float32) * w[None, :]
    y = acc * sigmoid(acc)
    tl.store(y_ptr + t[:, None] * y_stride + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots_ptr"])
def conv_head_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    dim,
    x_stride,
    y_stride,
    state_stride,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first K-1 outputs of one sequence, then its new state; BLOCK_D = 32 * num_warps, one channel per thread."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < dim
    begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64) - begin
    home = state_ptr + tl.load(slots_ptr + row) * state_stride + d * (K - 1)
    for j in tl.static_range(K - 1):
        live = d < tl.where(j < length, dim, 0)
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
            if j + k < K - 1:
                tap = tl.load(home + j + k, mask=live, other=0.0).to(x_ptr.dtype.element_ty)
            else:
                tap = tl.load(x_ptr + (begin + (j + k - (K - 1))) * x_stride + d, mask=live, other=0.0)
            acc += tap.to(tl.float32) * w
        y = acc * sigmoid(acc)
        tl.store(y_ptr + (begin + j) * y_stride + d, y.to(y_ptr.dtype.element_ty), mask=live)
    # an empty sequence leaves its slot alone
    some = tl.where(length > 0, dim, 0)
    # ascending, so that no input is overwritten before a later one that still needs it has been moved
    for j in tl.static_range(K - 1):
        position = length + j
        is_old = position < K - 1
        old = tl.load(home + position, mask=d < tl.where(is_old, some, 0), other=0.0)
        token = begin + position - (K - 1)
        new = tl.load(x_ptr + token * x_stride + d, mask=d < tl.where(is_old, 0, some), other=0.0)
        value = tl.where(is_old, old, new.to(state_ptr.dtype.element_ty))
        tl.store(home + j, value, mask=d < some)


@triton.jit(do_not_specialize=["slots_ptr"])
def conv_step_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    dim,
    x_stride,
    y_stride,
    state_stride,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token of one row; BLOCK_D = 32 * num_warps, one channel per thread."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < dim
    home = state_ptr + tl.load(slots_ptr + row) * state_stride + d * (K - 1)
    x = tl.load(x_ptr + row * x_stride + d, mask=mask_d, other=0.0)
    acc = x.to(tl.float32) * tl.load(weight_ptr + d * K + K - 1, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    for k in tl.static_range(K - 1):
        old = tl.load(home + k, mask=mask_d, other=0.0)
        w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
        acc += old.to(x_ptr.dtype.element_ty).to(tl.float32) * w
        if k > 0:
            tl.store(home + k - 1, old, mask=mask_d)
    tl.store(home + K - 2, x.to(state_ptr.dtype.element_ty), mask=mask_d)
    y = acc * sigmoid(acc)
    tl.store(y_ptr + row * y_stride + d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
