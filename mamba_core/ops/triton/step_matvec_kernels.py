"""The products of a decode step for very few rows, which are multiplied row by row while their weights stream by.

The norm before a product is taken apart: whoever writes the residual also writes ``gained``, its product with the
norm's weight, and the sums of its squares in shares [PARTS, B]; the product is divided by the rms at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.conv_kernels import at_home
from mamba_core.ops.triton.math import sigmoid
from mamba_core.ops.triton.step_kernels import await_inputs, fetch_scales, recall, shift_state, weigh


@triton.jit
def fetch_rows(w_ptr, n, in_width, out_width, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, EXACT: tl.constexpr):
    """Rows n of W [out, in], which are STEPS <= 5 tiles [BLOCK_N, BLOCK_K] wide, all on their way at once.

    Tiles beyond STEPS stand in for none. EXACT if the tiles have the width of W to the column.
    """
    k = tl.arange(0, BLOCK_K)
    base = w_ptr + tl.minimum(n, out_width - 1).to(tl.int64)[:, None] * in_width + k[None, :]
    if EXACT:
        w0 = tl.load(base, eviction_policy="evict_first")
    else:
        w0 = tl.load(base, mask=(k < in_width)[None, :], other=0.0, eviction_policy="evict_first")
    w1, w2, w3, w4 = w0, w0, w0, w0
    if STEPS > 1:
        w1 = tl.load(base + BLOCK_K, eviction_policy="evict_first")
    if STEPS > 2:
        w2 = tl.load(base + 2 * BLOCK_K, eviction_policy="evict_first")
    if STEPS > 3:
        w3 = tl.load(base + 3 * BLOCK_K, eviction_policy="evict_first")
    if STEPS > 4:
        w4 = tl.load(base + 4 * BLOCK_K, eviction_policy="evict_first")
    return w0, w1, w2, w3, w4


@triton.jit
def multiply_rows(
    w0,
    w1,
    w2,
    w3,
    w4,
    x_ptr,
    x_stride,
    in_width,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """[BLOCK_N, BLOCK_R] of the tiles of ``fetch_rows`` times the first ROWS rows of x."""
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    y = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for row in tl.static_range(ROWS):
        x_ptrs = x_ptr + row * x_stride + k
        x = tl.load(x_ptrs, mask=EXACT | (k < in_width), other=0.0).to(tl.float32)
        acc = w0.to(tl.float32) * x[None, :]
        if STEPS > 1:
            acc += w1.to(tl.float32) * tl.load(x_ptrs + BLOCK_K).to(tl.float32)[None, :]
        if STEPS > 2:
            acc += w2.to(tl.float32) * tl.load(x_ptrs + 2 * BLOCK_K).to(tl.float32)[None, :]
        if STEPS > 3:
            acc += w3.to(tl.float32) * tl.load(x_ptrs + 3 * BLOCK_K).to(tl.float32)[None, :]
        if STEPS > 4:
            acc += w4.to(tl.float32) * tl.load(x_ptrs + 4 * BLOCK_K).to(tl.float32)[None, :]
        product = tl.sum(acc, axis=1)
        y = tl.where((r == row)[None, :], product[:, None], y)
    return y


@triton.jit(do_not_specialize=["eps"])
def matvec_in_kernel(
    x_ptr,
    squares_ptr,
    w_ptr,
    scales_ptr,
    w_bias_ptr,
    taps_ptr,
    conv_bias_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    in_width,
    out_width,
    dim,
    state_stride,
    eps,
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    EXACT: tl.constexpr,
    X_ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    """For ROWS rows: y [B, out] = x W^T over the rms, of which the first ``dim`` outputs pass through the convolution.

    K = 0 for no convolution; else BLOCK_N divides ``dim``. PARTS = 0 for an x that is taken as it is. Rows of x are
    X_ROW times ``in_width`` apart.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    mask_n = n < out_width
    mask_r = r < ROWS
    mask = mask_n[:, None] & mask_r[None, :]
    w0, w1, w2, w3, w4 = fetch_rows(w_ptr, n, in_width, out_width, BLOCK_K, STEPS, EXACT)
    scales = fetch_scales(scales_ptr, w_ptr, n, out_width)
    is_convolved = tl.program_id(0) * BLOCK_N < dim
    if K > 0:
        slots = tl.load(slots_ptr + r, mask=mask_r, other=0)
        home, tap_stride = at_home(state_ptr, slots[None, :] * state_stride, n[:, None], dim, K, TAP_MAJOR)
        mask_past = (n < dim)[:, None] & mask_r[None, :]
        columns = recall(home, tap_stride, mask_past, K)
        past, newest_taps = weigh(columns, n, dim, taps_ptr, conv_bias_ptr, K, HAS_CONV_BIAS)
    await_inputs(PDL)
    if PARTS > 0:
        # on their way while the product is made
        p = tl.arange(0, BLOCK_P)
        shares_ptr = squares_ptr + p[:, None] * ROWS + r[None, :]
        shares = tl.load(shares_ptr, mask=(p < PARTS)[:, None] & mask_r[None, :], other=0.0)
    y = multiply_rows(
        w0, w1, w2, w3, w4, x_ptr, in_width * X_ROW, in_width, ROWS, BLOCK_R, BLOCK_N, BLOCK_K, STEPS, EXACT
    )
    y *= scales
    if PARTS > 0:
        y = y / tl.sqrt(tl.sum(shares, axis=0) / in_width + eps)[None, :]
    if HAS_BIAS:
        y += tl.load(w_bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if K > 0:  # noqa: SIM102  known to the compiler, the other is not
        if is_convolved:
            newest = y.to(state_ptr.dtype.element_ty)
            y = past + newest.to(tl.float32) * newest_taps
            y = y * sigmoid(y)
            shift_state(home, tap_stride, columns, newest, mask_past, K)
    y_ptrs = y_ptr + r.to(tl.int64)[None, :] * out_width + n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matvec_out_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    gain_ptr,
    residual_ptr,
    gained_ptr,
    squares_ptr,
    in_width,
    out_width,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    """For ROWS rows: residual [B, out] += x W^T, and what the next norm needs; a share of squares per program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    mask_n = n < out_width
    mask_r = r < ROWS
    mask = mask_n[:, None] & mask_r[None, :]
    w0, w1, w2, w3, w4 = fetch_rows(w_ptr, n, in_width, out_width, BLOCK_K, STEPS, EXACT)
    scales = fetch_scales(scales_ptr, w_ptr, n, out_width)
    gain = tl.load(gain_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    at = r[None, :] * out_width + n[:, None]
    await_inputs(PDL)
    before = tl.load(residual_ptr + at, mask=mask, other=0.0)
    y = multiply_rows(w0, w1, w2, w3, w4, x_ptr, in_width, in_width, ROWS, BLOCK_R, BLOCK_N, BLOCK_K, STEPS, EXACT)
    y = before + y * scales
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    tl.store(residual_ptr + at, y, mask=mask)
    tl.store(gained_ptr + at, (y * gain[:, None]).to(gained_ptr.dtype.element_ty), mask=mask)
    squares = tl.sum(tl.where(mask, y * y, 0.0), axis=0)
    tl.store(squares_ptr + tl.program_id(0) * ROWS + r, squares, mask=mask_r)
