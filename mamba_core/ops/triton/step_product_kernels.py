"""The products of a decode step for several rows, on the matrix units.

Where a product has few outputs its inputs are shared out as well, so that every multiprocessor streams weights. For few
rows the norm between two products is taken apart as in ``step_matvec_kernels``, and the last program of a tile adds its
shares up; for more rows that would keep one program too long, and a kernel of its own does both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.conv_kernels import at_home
from mamba_core.ops.triton.math import sigmoid
from mamba_core.ops.triton.step_kernels import await_inputs, fetch_scales, recall, shift_state, weigh


@triton.jit
def multiply(
    w_ptr,
    scales_ptr,
    x_ptr,
    n,
    b,
    mask_b,
    begin,
    end,
    x_stride,
    in_width,
    out_width,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[BLOCK_N, BLOCK_B] of W [out, in] times x [B, in] over inputs ``begin`` to ``end``, whole blocks if EVEN.

    scales [out] fp32 are for a W in int8, which the type of x holds exactly.
    """
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + tl.minimum(n, out_width - 1).to(tl.int64)[:, None] * in_width + k[None, :]
    x_ptrs = x_ptr + b.to(tl.int64)[None, :] * x_stride + k[:, None]
    scales = fetch_scales(scales_ptr, w_ptr, n, out_width)
    # what is widened is the second operand: of the first, the compiler reads two bytes at a time
    IS_INT8: tl.constexpr = w_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros([BLOCK_B, BLOCK_N] if IS_INT8 else [BLOCK_N, BLOCK_B], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        if EVEN:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, mask=mask_b[None, :], other=0.0)
        else:
            mask_k = start + k < end
            w = tl.load(w_ptrs + start, mask=mask_k[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, mask=mask_b[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(tl.trans(x), tl.trans(w.to(x.dtype)), acc) if IS_INT8 else tl.dot(w, x, acc)
    return tl.trans(acc) * scales if IS_INT8 else acc


@triton.jit(do_not_specialize=["num_rows", "eps"])
def product_in_kernel(
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
    num_rows,
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
    EARLY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [B, out] = x W^T over the rms, of which the first ``dim`` outputs pass through the convolution.

    PARTS = 0 for an x that is taken as it is. BLOCK_N divides ``dim``. EARLY to read the convolution's past before the
    product is made, for which a tile of few rows has the registers.
    """
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.arange(0, BLOCK_P)
    mask_n = n < out_width
    mask_b = b < num_rows
    is_convolved = tl.program_id(1) * BLOCK_N < dim
    slots = tl.load(slots_ptr + b, mask=mask_b, other=0)
    home, tap_stride = at_home(state_ptr, slots[None, :] * state_stride, n[:, None], dim, K, TAP_MAJOR)
    mask_past = mask_b[None, :] & (n < dim)[:, None]
    if EARLY:
        columns = recall(home, tap_stride, mask_past, K)
        past, newest_taps = weigh(columns, n, dim, taps_ptr, conv_bias_ptr, K, HAS_CONV_BIAS)
    await_inputs(PDL)
    if PARTS > 0:
        # on their way while the product is made
        shares_ptr = squares_ptr + p[:, None] * num_rows + b[None, :]
        shares = tl.load(shares_ptr, mask=(p < PARTS)[:, None] & mask_b[None, :], other=0.0)
    acc = multiply(
        w_ptr,
        scales_ptr,
        x_ptr,
        n,
        b,
        mask_b,
        0,
        in_width,
        in_width,
        in_width,
        out_width,
        BLOCK_N,
        BLOCK_B,
        BLOCK_K,
        EVEN,
    )
    if PARTS > 0:
        acc = acc / tl.sqrt(tl.sum(shares, axis=0) / in_width + eps)[None, :]
    if HAS_BIAS:
        acc += tl.load(w_bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if is_convolved:
        newest = acc.to(state_ptr.dtype.element_ty)
        if EARLY:
            acc = past + newest.to(tl.float32) * newest_taps
        else:
            # a column at a time, since a tile of many rows has no registers for all
            acc = newest.to(tl.float32) * tl.load(taps_ptr + n * K + K - 1).to(tl.float32)[:, None]
            if HAS_CONV_BIAS:
                acc += tl.load(conv_bias_ptr + n).to(tl.float32)[:, None]
            for j in tl.static_range(K - 1):
                old = tl.load(home + j * tap_stride, mask=mask_past, other=0.0)
                acc += old.to(tl.float32) * tl.load(taps_ptr + n * K + j).to(tl.float32)[:, None]
            columns = recall(home, tap_stride, mask_past, K)
        shift_state(home, tap_stride, columns, newest, mask_past, K)
        acc = acc * sigmoid(acc)
    y_ptrs = y_ptr + b.to(tl.int64)[None, :] * out_width + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_b[None, :])


@triton.jit
def add_shares(acc, at, mask, part, size, share_ptr, counter, SHARES: tl.constexpr):
    """Leave a share [SHARES, B, out] fp32; of the programs of a tile the last to come gets their sum, and True.

    The shares are added in their order, whoever came last. ``counter`` is zero before and after.
    """
    tl.store(share_ptr + part * size + at, acc, mask=mask)
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SHARES - 1
    if is_last:
        tl.store(counter, 0)
        acc = tl.zeros_like(acc)
        for other in tl.static_range(SHARES):
            acc += tl.load(share_ptr + other * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    return acc, is_last


@triton.jit(do_not_specialize=["num_rows"])
def product_shared_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    y_ptr,
    share_ptr,
    count_ptr,
    num_rows,
    x_stride,
    in_width,
    out_width,
    SHARE: tl.constexpr,
    SHARES: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """x W^T with SHARE inputs to a program: ``share`` [SHARES, B, out] fp32; with SUM its sum, y [B, out] fp32.

    ``count`` [tiles] is zero before and after.
    """
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(2)
    mask_b = b < num_rows
    mask = (n < out_width)[:, None] & mask_b[None, :]
    begin = part * SHARE
    end = tl.minimum(begin + SHARE, in_width)
    at = b.to(tl.int64)[None, :] * out_width + n[:, None]
    size = num_rows.to(tl.int64) * out_width
    await_inputs(PDL)
    acc = multiply(
        w_ptr,
        scales_ptr,
        x_ptr,
        n,
        b,
        mask_b,
        begin,
        end,
        x_stride,
        in_width,
        out_width,
        BLOCK_N,
        BLOCK_B,
        BLOCK_K,
        EVEN,
    )
    if SUM:
        counter = count_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        total, is_last = add_shares(acc, at, mask, part, size, share_ptr, counter, SHARES)
        if is_last:
            tl.store(y_ptr + at, total, mask=mask)
    else:
        tl.store(share_ptr + part * size + at, acc, mask=mask)


@triton.jit(do_not_specialize=["size"])
def sum_kernel(share_ptr, y_ptr, size, SHARES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y [size], the sum of what ``product_shared_kernel`` leaves, share [SHARES, size] fp32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    await_inputs(PDL)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(share_ptr + share * size.to(tl.int64) + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def product_out_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    bias_ptr,
    gain_ptr,
    residual_ptr,
    gained_ptr,
    squares_ptr,
    share_ptr,
    count_ptr,
    num_rows,
    in_width,
    out_width,
    SHARE: tl.constexpr,
    SHARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """residual [B, out] += x W^T, with SHARE inputs to a program, and what the next norm needs.

    ``gained`` [B, out]; ``squares`` [tiles of outputs, B]; ``count`` [tiles].
    """
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(2)
    mask_n = n < out_width
    mask_b = b < num_rows
    begin = part * SHARE
    end = tl.minimum(begin + SHARE, in_width)
    gain = tl.load(gain_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    await_inputs(PDL)
    acc = multiply(
        w_ptr,
        scales_ptr,
        x_ptr,
        n,
        b,
        mask_b,
        begin,
        end,
        in_width,
        in_width,
        out_width,
        BLOCK_N,
        BLOCK_B,
        BLOCK_K,
        EVEN,
    )
    mask = mask_n[:, None] & mask_b[None, :]
    at = b.to(tl.int64)[None, :] * out_width + n[:, None]
    before = tl.load(residual_ptr + at, mask=mask, other=0.0)
    counter = count_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    total, is_last = add_shares(acc, at, mask, part, num_rows.to(tl.int64) * out_width, share_ptr, counter, SHARES)
    if is_last:
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        total += before
        # every thread has read what was there, also one that holds an element beside others
        tl.debug_barrier()
        tl.store(residual_ptr + at, total, mask=mask)
        tl.store(gained_ptr + at, (total * gain[:, None]).to(gained_ptr.dtype.element_ty), mask=mask)
        squares = tl.sum(tl.where(mask, total * total, 0.0), axis=0)
        tl.store(squares_ptr + tl.program_id(1) * num_rows + b, squares, mask=mask_b)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def gather_kernel(
    x_ptr,
    bias_ptr,
    gain_ptr,
    residual_ptr,
    normed_ptr,
    num_rows,
    width,
    eps,
    SHARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: residual [H] += the sum of x [SHARES, B, H], and its norm [H]."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < width
    gain = tl.load(gain_ptr + h, mask=mask, other=0.0).to(tl.float32)
    v = tl.zeros([BLOCK_H], dtype=tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    # of the layer before, not of the kernel before
    v += tl.load(residual_ptr + row * width + h, mask=mask, other=0.0)
    await_inputs(PDL)
    for share in tl.static_range(SHARES):
        v += tl.load(x_ptr + (share * num_rows + row) * width + h, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / width + eps)
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    tl.store(residual_ptr + row * width + h, v, mask=mask)
    tl.store(normed_ptr + row * width + h, (v * scale * gain).to(normed_ptr.dtype.element_ty), mask=mask)
