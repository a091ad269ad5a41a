"""Depthwise causal convolution with SiLU, forward and backward: Triton kernels.

Tiles are [BLOCK_T, BLOCK_D] tokens by channels. A tap that lies before the sequence's first token is read from the
sequence's history, its K-1 last inputs of earlier calls; only programs near such a start pay for that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.math import sigmoid


@triton.jit
def _tap(x_ptr, history_ptr, t, since, source, d, mask_d, x_stride, history_stride, K: tl.constexpr, TAP: tl.constexpr):
    """Input TAP of each token's window [BLOCK_T, BLOCK_D] fp32; ``since`` counts the sequence's tokens before t."""
    distance = K - 1 - TAP
    inside = since >= distance
    value = tl.load(
        x_ptr + (t - distance)[:, None] * x_stride + d[None, :], mask=inside[:, None] & mask_d[None, :], other=0.0
    ).to(tl.float32)
    if TAP < K - 1:  # noqa: SIM102  the one is decided by the compiler, the other by the data
        if tl.min(since, axis=0) < distance:
            index = tl.where(inside, 0, since + TAP)
            offset = source[:, None] * history_stride + d[None, :] * (K - 1) + index[:, None]
            past = tl.load(history_ptr + offset, mask=(since < distance)[:, None] & mask_d[None, :], other=0.0)
            value += past.to(x_ptr.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
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
    dim,
    x_stride,
    y_stride,
    state_stride,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = t < num_tokens
    mask_d = d < dim
    # past the end the last token is worked on again, and not stored
    t_in = tl.minimum(t, num_tokens - 1)
    row = tl.load(seq_idx_ptr + t_in)
    since = t_in - tl.load(cu_seqlens_ptr + row).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
        value = _tap(x_ptr, state_ptr, t_in, since, slot, d, mask_d, x_stride, state_stride, K, k)
        acc += value * w[None, :]
    y = acc * sigmoid(acc)
    out = t[:, None] * y_stride + d[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d[None, :])


@triton.jit
def conv_state_kernel(
    x_ptr,
    state_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    dim,
    x_stride,
    state_stride,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Leave the last K-1 inputs of one sequence in its slot; BLOCK_D = 32 * num_warps, one channel per thread."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64) - begin
    # an empty sequence leaves its slot alone
    live = tl.where(length > 0, dim, 0)
    home = state_ptr + tl.load(slots_ptr + row) * state_stride + d * (K - 1)
    # ascending, so that no input is overwritten before a later one that still needs it has been moved
    for j in tl.static_range(K - 1):
        position = length + j
        is_old = position < K - 1
        old = tl.load(home + position, mask=d < tl.where(is_old, live, 0), other=0.0)
        token = begin + position - (K - 1)
        new = tl.load(x_ptr + token * x_stride + d, mask=d < tl.where(is_old, 0, live), other=0.0)
        value = tl.where(is_old, old, new.to(state_ptr.dtype.element_ty))
        tl.store(home + j, value, mask=d < live)


@triton.jit
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


@triton.jit
def conv_backward_weight_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    history_ptr,
    seq_idx_ptr,
    cu_seqlens_ptr,
    dpre_ptr,
    dweight_ptr,
    dbias_ptr,
    num_tokens,
    dim,
    x_stride,
    dy_stride,
    history_stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient before the SiLU, dpre [T, D] fp32, and each program's share of those of the weight, [programs, K, D],
    and of the bias, [programs, D]; history [B, D, K-1] is a copy of the state before the forward pass."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < dim
    tap = tl.arange(0, BLOCK_K)
    dweight = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_t = t < num_tokens
        t_in = tl.minimum(t, num_tokens - 1)
        row = tl.load(seq_idx_ptr + t_in)
        since = t_in - tl.load(cu_seqlens_ptr + row).to(tl.int64)
        source = row.to(tl.int64)
        pre = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        if HAS_BIAS:
            pre += tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(K):
            w = tl.load(weight_ptr + d * K + k, mask=mask_d, other=0.0).to(tl.float32)
            value = _tap(x_ptr, history_ptr, t_in, since, source, d, mask_d, x_stride, history_stride, K, k)
            pre += value * w[None, :]
        mask = mask_t[:, None] & mask_d[None, :]
        dy = tl.load(dy_ptr + t[:, None] * dy_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(pre)
        dpre = dy * gate * (1.0 + pre * (1.0 - gate))
        tl.store(dpre_ptr + t[:, None] * dim + d[None, :], dpre, mask=mask)
        dbias += tl.sum(dpre, axis=0)
        for k in tl.static_range(K):
            value = _tap(x_ptr, history_ptr, t_in, since, source, d, mask_d, x_stride, history_stride, K, k)
            share = tl.sum(dpre * value, axis=0)
            dweight += tl.where((tap == k)[:, None], share[None, :], 0.0)
    out = program * K * dim + tap[:, None] * dim + d[None, :]
    tl.store(dweight_ptr + out, dweight, mask=(tap < K)[:, None] & mask_d[None, :])
    tl.store(dbias_ptr + program * dim + d, dbias, mask=mask_d)


@triton.jit
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
