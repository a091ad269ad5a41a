"""One token per row through a Mamba layer in few launches: Triton kernels.

A step streams all weights past the chip, so each kernel is written to keep memory busy: with PDL (programmatic
dependent launch, from compute capability 9.0) a kernel starts while its predecessor drains, and fetches before
``gdc_wait`` what does not depend on it: weights, and states, which the step before has left long ago. Loads whose
address must be loaded itself come last, or they would hold back the others.

For very few rows the norm before a product is taken apart: whoever writes the residual also writes ``gained``, its
product with the norm's weight, and the sums of its squares in shares [PARTS, B]; the product is divided by the rms at
its end. For more rows the norm is a kernel that also adds up what the programs of the product before have shared out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mamba_core.ops.triton.math import LOG2_E, sigmoid, softplus


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Let the next kernel start, then wait for what the kernels before have written."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit(do_not_specialize=["eps"])
def embed_kernel(
    tokens_ptr,
    table_ptr,
    gain_ptr,
    residual_ptr,
    normed_ptr,
    width,
    eps,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row's embedding as residual [B, H] fp32, and its norm [B, H]."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < width
    gain = tl.load(gain_ptr + h, mask=mask, other=0.0).to(tl.float32)
    await_inputs(PDL)
    v = tl.load(table_ptr + tl.load(tokens_ptr + row) * width + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + row * width + h, v, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / width + eps)
    tl.store(normed_ptr + row * width + h, (v * scale * gain).to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def shift_state(home, newest, mask, K: tl.constexpr):
    """Move the K-1 inputs at ``home`` on by one, once every thread of the program has read them.

    Several threads may hold the same element of a small tile, and one that is late must not read what has been moved.
    """
    columns = ()
    for j in tl.static_range(1, K - 1):
        columns += (tl.load(home + j, mask=mask, other=0.0),)
    tl.debug_barrier()
    for j in tl.static_range(1, K - 1):
        tl.store(home + j - 1, columns[j - 1], mask=mask)
    tl.store(home + K - 2, newest, mask=mask)


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
    is_convolved = tl.program_id(0) * BLOCK_N < dim
    past = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    newest = tl.zeros([BLOCK_N], dtype=tl.float32)
    home = state_ptr + n[:, None] * K + r[None, :] * 0
    if K > 0:
        slots = tl.load(slots_ptr + r, mask=mask_r, other=0)
        home = state_ptr + slots[None, :] * state_stride + n[:, None] * (K - 1)
        if is_convolved:
            if HAS_CONV_BIAS:
                past += tl.load(conv_bias_ptr + n).to(tl.float32)[:, None]
            for j in tl.static_range(K - 1):
                old = tl.load(home + j, mask=mask_r[None, :], other=0.0)
                past += old.to(tl.float32) * tl.load(taps_ptr + n * K + j).to(tl.float32)[:, None]
            newest = tl.load(taps_ptr + n * K + K - 1).to(tl.float32)
    await_inputs(PDL)
    y = multiply_rows(
        w0, w1, w2, w3, w4, x_ptr, in_width * X_ROW, in_width, ROWS, BLOCK_R, BLOCK_N, BLOCK_K, STEPS, EXACT
    )
    if PARTS > 0:
        p = tl.arange(0, BLOCK_P)
        shares = squares_ptr + p[:, None] * ROWS + r[None, :]
        squares = tl.sum(tl.load(shares, mask=(p < PARTS)[:, None] & mask_r[None, :], other=0.0), axis=0)
        y = y / tl.sqrt(squares / in_width + eps)[None, :]
    if HAS_BIAS:
        y += tl.load(w_bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if K > 0:  # noqa: SIM102  known to the compiler, the other is not
        if is_convolved:
            kept = y.to(state_ptr.dtype.element_ty)
            shift_state(home, kept, mask_r[None, :], K)
            y = past + kept.to(tl.float32) * newest[:, None]
            y = y * sigmoid(y)
    y_ptrs = y_ptr + r.to(tl.int64)[None, :] * out_width + n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matvec_out_kernel(
    x_ptr,
    w_ptr,
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
    gain = tl.load(gain_ptr + n, mask=mask_n, other=0.0).to(tl.float32)
    at = r[None, :] * out_width + n[:, None]
    await_inputs(PDL)
    before = tl.load(residual_ptr + at, mask=mask, other=0.0)
    y = before + multiply_rows(
        w0, w1, w2, w3, w4, x_ptr, in_width, in_width, ROWS, BLOCK_R, BLOCK_N, BLOCK_K, STEPS, EXACT
    )
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    tl.store(residual_ptr + at, y, mask=mask)
    tl.store(gained_ptr + at, (y * gain[:, None]).to(gained_ptr.dtype.element_ty), mask=mask)
    squares = tl.sum(tl.where(mask, y * y, 0.0), axis=0)
    tl.store(squares_ptr + tl.program_id(0) * ROWS + r, squares, mask=mask_r)


@triton.jit
def multiply(
    w_ptr,
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
    """[BLOCK_N, BLOCK_B] of W [out, in] times x [B, in] over inputs ``begin`` to ``end``, whole blocks if EVEN."""
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + tl.minimum(n, out_width - 1).to(tl.int64)[:, None] * in_width + k[None, :]
    x_ptrs = x_ptr + b.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_B], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        if EVEN:
            w = tl.load(w_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, mask=mask_b[None, :], other=0.0)
        else:
            mask_k = start + k < end
            w = tl.load(w_ptrs + start, mask=mask_k[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, mask=mask_b[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def product_in_kernel(
    x_ptr,
    w_ptr,
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
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """``matvec_in_kernel`` for several rows, on the matrix units, and of a finished norm: y [B, out]."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_n = n < out_width
    mask_b = b < num_rows
    mask = mask_n[:, None] & mask_b[None, :]
    slots = tl.load(slots_ptr + b, mask=mask_b, other=0)
    await_inputs(PDL)
    acc = multiply(
        w_ptr, x_ptr, n, b, mask_b, 0, in_width, in_width, in_width, out_width, BLOCK_N, BLOCK_B, BLOCK_K, EVEN
    )
    if HAS_BIAS:
        acc += tl.load(w_bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if K > 0:  # noqa: SIM102  known to the compiler, the other is not
        if tl.program_id(1) * BLOCK_N < dim:
            home = state_ptr + slots[None, :] * state_stride + n[:, None] * (K - 1)
            kept = acc.to(state_ptr.dtype.element_ty)
            acc = kept.to(tl.float32) * tl.load(taps_ptr + n * K + K - 1).to(tl.float32)[:, None]
            if HAS_CONV_BIAS:
                acc += tl.load(conv_bias_ptr + n).to(tl.float32)[:, None]
            for j in tl.static_range(K - 1):
                old = tl.load(home + j, mask=mask_b[None, :], other=0.0)
                acc += old.to(tl.float32) * tl.load(taps_ptr + n * K + j).to(tl.float32)[:, None]
            shift_state(home, kept, mask_b[None, :], K)
            acc = acc * sigmoid(acc)
    tl.store(y_ptr + b.to(tl.int64)[None, :] * out_width + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def product_shared_kernel(
    x_ptr,
    w_ptr,
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
    """x W^T with the inputs shared out over SHARES programs: ``share`` [SHARES, B, out] fp32.

    With SUM the last program of a tile adds its shares up: y [B, out] fp32. ``count`` [tiles] is zero before and after.
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
        w_ptr, x_ptr, n, b, mask_b, begin, end, x_stride, in_width, out_width, BLOCK_N, BLOCK_B, BLOCK_K, EVEN
    )
    tl.store(share_ptr + part * size + at, acc, mask=mask)
    if SUM:
        tl.debug_barrier()
        counter = count_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SHARES - 1:
            tl.store(counter, 0)
            total = tl.zeros([BLOCK_N, BLOCK_B], dtype=tl.float32)
            # in the order of the shares, whoever came last
            for other in tl.static_range(SHARES):
                total += tl.load(share_ptr + other * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + at, total, mask=mask)


@triton.jit(do_not_specialize=["eps"])
def finish_kernel(
    values_ptr,
    squares_ptr,
    y_ptr,
    width,
    eps,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """``gained`` of one of ROWS rows over its rms: y [B, H]."""
    row = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    p = tl.arange(0, BLOCK_P)
    mask = h < width
    await_inputs(PDL)
    squares = tl.sum(tl.load(squares_ptr + p * ROWS + row, mask=p < PARTS, other=0.0), axis=0)
    v = tl.load(values_ptr + row * width + h, mask=mask, other=0.0).to(tl.float32)
    y = v / tl.sqrt(squares / width + eps)
    tl.store(y_ptr + row * width + h, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    """One row: residual [H] += the sum of x [SHARES, B, H], and its norm [H], which may be where x is."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < width
    gain = tl.load(gain_ptr + h, mask=mask, other=0.0).to(tl.float32)
    v = tl.zeros([BLOCK_H], dtype=tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + h, mask=mask, other=0.0).to(tl.float32)
    await_inputs(PDL)
    v += tl.load(residual_ptr + row * width + h, mask=mask, other=0.0)
    for share in tl.static_range(SHARES):
        v += tl.load(x_ptr + (share * num_rows + row) * width + h, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / width + eps)
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    tl.store(residual_ptr + row * width + h, v, mask=mask)
    tl.store(normed_ptr + row * width + h, (v * scale * gain).to(normed_ptr.dtype.element_ty), mask=mask)


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
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """delta = softplus(dt_proj + bias) [B, D] fp32 of the first R columns of low [B, WIDTH] fp32, normed if NORM."""
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    mask_b = b < num_rows
    mask_d = d < dim
    mask_r = r < R
    w = tl.load(w_ptr + d[:, None] * R + r[None, :], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    await_inputs(PDL)
    low = tl.load(low_ptr + b[:, None] * WIDTH + r[None, :], mask=mask_b[:, None] & mask_r[None, :], other=0.0)
    if NORM:
        low = low / tl.sqrt(tl.sum(low * low, axis=1) / R + eps)[:, None]
    delta = softplus(tl.dot(low.to(w.dtype), tl.trans(w)) + bias[None, :])
    at = b.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(delta_ptr + at, delta, mask=mask_b[:, None] & mask_d[None, :])


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
    dim,
    state_stride,
    eps,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN_DELTA: tl.constexpr,
    RAW_DELTA: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """The recurrence of one row's BLOCK_D channels and the gate: y [B, D] from xz [B, 2 D] and low [B, R + 2 N].

    With OWN_DELTA dt_proj and softplus as well; else delta [B, D] is given, with RAW_DELTA before its bias and
    softplus. With NORM, dt, B and C are normed first, as Falcon's Mamba does.
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
    h = tl.load(home, mask=mask, other=0.0).to(tl.float32)
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
        delta = tl.load(delta_ptr + row * dim + d, mask=mask_d, other=0.0).to(tl.float32)
        if RAW_DELTA:
            delta = softplus(delta + bias)
    h = tl.exp2(delta[:, None] * a) * h + (delta * x)[:, None] * b[None, :]
    y = tl.sum(h * c[None, :], axis=1) + skip * x
    y = y * (z * sigmoid(z))
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    tl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + row * dim + d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
