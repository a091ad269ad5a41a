"""The recurrence of a decode step, with dt_proj before it and the gate behind it.

What comes from the kernels just before is x and z, in xz [B, 2 D], and low [B, R + 2 N]: dt before its projection, B
and C. With NORM those three are normed first, as Falcon's Mamba does. The result is y [B, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.math import LOG2_E, sigmoid, softplus
from mamba_core.ops.triton.step_kernels import await_inputs, await_inputs_first
from mamba_core.ops.triton.step_lag_kernels import catch_up, is_left_behind, keep_token, move, recall_token


@triton.jit(do_not_specialize=["num_rows", "eps"])
def delta_kernel(
    low_ptr,
    w_ptr,
    bias_ptr,
    delta_ptr,
    num_rows,
    dim,
    eps,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """delta [B, D] of the first R columns of low [B, WIDTH], normed if NORM: softplus(dt_proj + bias).

    With RAW, for many rows, without bias and softplus.
    """
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    mask_b = b < num_rows
    mask_d = d < dim
    weights = ()
    for begin in tl.static_range(0, R, BLOCK_R):
        mask = mask_d[:, None] & (begin + r < R)[None, :]
        weights += (tl.load(w_ptr + d[:, None] * R + begin + r[None, :], mask=mask, other=0.0),)
    if not RAW:
        bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    await_inputs_first(PDL)
    inputs = ()
    for begin in tl.static_range(0, R, BLOCK_R):
        mask = mask_b[:, None] & (begin + r < R)[None, :]
        inputs += (tl.load(low_ptr + b[:, None] * WIDTH + begin + r[None, :], mask=mask, other=0.0),)
    delta = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    squares = tl.zeros([BLOCK_B], dtype=tl.float32)
    for i in tl.static_range(len(inputs)):
        delta = tl.dot(inputs[i].to(w_ptr.dtype.element_ty), tl.trans(weights[i]), delta)
        if NORM:
            v = inputs[i].to(tl.float32)
            squares += tl.sum(v * v, axis=1)
    if NORM:
        delta = delta / tl.sqrt(squares / R + eps)[:, None]
    if not RAW:
        delta = softplus(delta + bias[None, :])
    at = b.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["eps"])
def advance_kernel(
    xz_ptr,
    low_ptr,
    delta_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    d_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    phases_ptr,
    kept_ptr,
    kept_b_ptr,
    dim,
    state_stride,
    eps,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    OWN_DELTA: tl.constexpr,
    RAW_DELTA: tl.constexpr,
    LAGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_D channels of one row.

    With OWN_DELTA dt_proj and softplus as well; else delta [B, D] is given, with RAW_DELTA before its bias and
    softplus. With LAGS, and then RAW_DELTA, of some rows the token is kept and their states are not written, see
    ``step_lag_kernels``.
    """
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    mask_d = d < dim
    mask_n = n < N
    mask_r = r < R
    mask = mask_d[:, None] & mask_n[None, :]
    tile = d[:, None] * N + n[None, :]
    slot = tl.load(slots_ptr + row)
    if OWN_DELTA:
        w = tl.load(w_ptr + d[:, None] * R + r[None, :], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + tile, mask=mask, other=0.0) * LOG2_E
    skip = tl.load(d_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    home = state_ptr + slot * state_stride + tile
    # the states of many rows only pass through the cache, and would drive out what is read again
    policy: tl.constexpr = "evict_first" if RAW_DELTA else ""
    h = tl.load(home, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)
    if LAGS:
        phase = tl.load(phases_ptr + slot)
        kept = kept_ptr + slot * 2 * dim
        kept_b = kept_b_ptr + slot * N
        token = recall_token(kept, kept_b, phase, d, n, dim, N)
    await_inputs(PDL)
    x = tl.load(xz_ptr + row * 2 * dim + d, mask=mask_d, other=0.0).to(tl.float32)
    z = tl.load(xz_ptr + row * 2 * dim + dim + d, mask=mask_d, other=0.0).to(tl.float32)
    source = low_ptr + row * (R + 2 * N)
    b = tl.load(source + R + n, mask=mask_n, other=0.0).to(tl.float32)
    c = tl.load(source + R + N + n, mask=mask_n, other=0.0).to(tl.float32)
    if NORM:
        b = b / tl.sqrt(tl.sum(b * b, axis=0) / N + eps)
        c = c / tl.sqrt(tl.sum(c * c, axis=0) / N + eps)
    if OWN_DELTA:
        low = tl.load(source + r, mask=mask_r, other=0.0).to(tl.float32)
        if NORM:
            low = low / tl.sqrt(tl.sum(low * low, axis=0) / R + eps)
        delta = softplus(tl.sum(w.to(tl.float32) * low[None, :], axis=1) + bias)
    else:
        raw = tl.load(delta_ptr + row * dim + d, mask=mask_d, other=0.0)
        delta = raw.to(tl.float32)
        if RAW_DELTA:
            delta = softplus(delta + bias)
    if LAGS:
        h = catch_up(h, a, bias, token, phase)
    h = move(h, a, delta, x, b)
    y = tl.sum(h * c[None, :], axis=1) + skip * x
    y = y * (z * sigmoid(z))
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    if LAGS:
        lags = is_left_behind(phase, slot)
        keep_token(kept, kept_b, lags, x, raw, b, d, n, dim, N)
        mask = mask & (d < tl.where(lags, 0, dim))[:, None]
    tl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask, eviction_policy=policy)
    tl.store(y_ptr + row * dim + d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
