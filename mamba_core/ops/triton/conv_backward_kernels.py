"""Depthwise causal convolution with SiLU, backward: Triton kernels.

Two kernels compute ``dpre`` [T, D] fp32, the gradient before the SiLU, and each program's share of the gradients of the
weight, [programs, K, D], and of the bias, [programs, D]: one for the first K-1 tokens of each sequence, whose windows
reach into its history, one for all further tokens. A third turns dpre into the gradient of x. Adding up the shares is
the host's part, so that the result does not depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.math import sigmoid


@triton.jit(do_not_specialize=["num_tokens", "nothing"])
def conv_backward_weight_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    seq_idx_ptr,
    cu_seqlens_ptr,
    dpre_ptr,
    dweight_ptr,
    dbias_ptr,
    num_tokens,
    dim,
    x_stride,
    dy_stride,
    nothing,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All but the first K-1 tokens of a sequence; one channel per thread (see ``tiles``): token sums are local."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < dim
    column = (d + nothing)[None, :]
    tap_index = tl.arange(0, BLOCK_K)
    dweight = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        row = tl.load(seq_idx_ptr + t, mask=t < num_tokens, other=0)
        begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        mask = ((t < num_tokens) & (t - begin >= K - 1))[:, None] & mask_d[None, :]
        pre = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        if HAS_BIAS:
            pre += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(K):
            w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
            tap = tl.load(x_ptr + (t - (K - 1 - k))[:, None] * x_stride + column, mask=mask, other=0.0)
            pre += tap.to(tl.float32) * w[None, :]
        dy = tl.load(dy_ptr + t[:, None] * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(pre)
        dpre = dy * gate * (1.0 + pre * (1.0 - gate))
        dbias += tl.sum(dpre, axis=0)
        for k in tl.static_range(K):
            tap = tl.load(x_ptr + (t - (K - 1 - k))[:, None] * x_stride + column, mask=mask, other=0.0)
            share = tl.sum(dpre * tap.to(tl.float32), axis=0)
            dweight += tl.where((tap_index == k)[:, None], share[None, :], 0.0)
        tl.store(dpre_ptr + t[:, None] * dim + column, dpre, mask=mask)
    out = program * K * dim + tap_index[:, None] * dim + column
    tl.store(dweight_ptr + out, dweight, mask=(tap_index < K)[:, None] & mask_d[None, :])
    tl.store(dbias_ptr + program * dim + d, dbias, mask=mask_d)


@triton.jit(do_not_specialize=["num_rows", "nothing"])
def conv_backward_head_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    history_ptr,
    cu_seqlens_ptr,
    dpre_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    dim,
    x_stride,
    dy_stride,
    history_stride,
    nothing,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first K-1 tokens of each sequence; history [B, D, K-1] is a copy of the states before the forward pass."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < dim
    tap_index = tl.arange(0, BLOCK_K)
    dweight = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64) - begin
        # the row number is widened by the offset it is multiplied with
        past = history_ptr + (begin * 0 + row) * history_stride + d * (K - 1)
        for j in tl.static_range(K - 1):
            live = d < tl.where(j < length, dim, 0)
            window = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
            pre = tl.zeros([BLOCK_D], dtype=tl.float32)
            if HAS_BIAS:
                pre += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
            for k in tl.static_range(K):
                w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
                if j + k < K - 1:
                    tap = tl.load(past + j + k, mask=live, other=0.0).to(x_ptr.dtype.element_ty)
                else:
                    tap = tl.load(x_ptr + (begin + (j + k - (K - 1))) * x_stride + d, mask=live, other=0.0)
                pre += tap.to(tl.float32) * w
                window = tl.where((tap_index == k)[:, None], tap.to(tl.float32)[None, :], window)
            dy = tl.load(dy_ptr + (begin + j) * dy_stride + d, mask=live, other=0.0).to(tl.float32)
            gate = sigmoid(pre)
            dpre = dy * gate * (1.0 + pre * (1.0 - gate))
            tl.store(dpre_ptr + (begin + j) * dim + d, dpre, mask=live)
            dbias += dpre
            dweight += window * dpre[None, :]
    out = program * K * dim + tap_index[:, None] * dim + (d + nothing)[None, :]
    tl.store(dweight_ptr + out, dweight, mask=(tap_index < K)[:, None] & mask_d[None, :])
    tl.store(dbias_ptr + program * dim + d, dbias, mask=mask_d)


@triton.jit(do_not_specialize=["num_tokens"])
def conv_backward_input_kernel(
    dpre_ptr,
    weight_ptr,
    dx_ptr,
    seq_idx_ptr,
    cu_seqlens_ptr,
    num_tokens,
    dim,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx [T, D]: each token's share in the outputs of itself and of the K-1 tokens after it in its sequence."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = t < num_tokens
    mask_d = d < dim
    row = tl.load(seq_idx_ptr + t, mask=mask_t, other=0)
    end = tl.load(cu_seqlens_ptr + row + 1, mask=mask_t, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for k in tl.static_range(K):
        later = t + (K - 1 - k)
        w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
        mask = (later < end)[:, None] & mask_d[None, :]
        acc += tl.load(dpre_ptr + later[:, None] * dim + d[None, :], mask=mask, other=0.0) * w[None, :]
    out = t[:, None] * dim + d[None, :]
    tl.store(dx_ptr + out, acc.to(dx_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d[None, :])
