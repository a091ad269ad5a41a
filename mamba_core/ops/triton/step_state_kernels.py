"""The recurrence of a decode step, with dt_proj before it and the gate behind it.

What comes from the kernels just before is x and z, in xz [B, 2 D], and low [B, R + 2 N]: dt before its projection, B
and C. With NORM those three are normed first, as Falcon's Mamba does. The result is y [B, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.math import LOG2_E, sigmoid, softplus
from mamba_core.ops.triton.step_kernels import await_inputs


@triton.jit(do_not_specialize=["eps"])
def advance_row_kernel(
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
    NORM: tl.constexpr,
    OWN_DELTA: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_D channels of one row; dt_proj as well with OWN_DELTA, else its result is ``delta`` [B, D]."""
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
        delta = tl.sum(w.to(tl.float32) * low[None, :], axis=1)
    else:
        delta = tl.load(delta_ptr + row * dim + d, mask=mask_d, other=0.0).to(tl.float32)
    delta = softplus(delta + bias)
    h = tl.exp2(delta[:, None] * a) * h + (delta * x)[:, None] * b[None, :]
    y = tl.sum(h * c[None, :], axis=1) + skip * x
    y = y * (z * sigmoid(z))
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    tl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + row * dim + d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def advance_rows_kernel(
    xz_ptr,
    low_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    d_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    num_rows,
    dim,
    state_stride,
    eps,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_D channels of BLOCK_B rows, whose delta comes from the matrix units; all their states at once."""
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    mask_b = b < num_rows
    mask_d = d < dim
    mask_n = n < N
    mask_r = r < R
    mask_bd = mask_b[:, None] & mask_d[None, :]
    mask_bn = mask_b[:, None] & mask_n[None, :]
    mask_dn = mask_d[:, None] & mask_n[None, :]
    mask = mask_bd[:, :, None] & mask_n[None, None, :]
    tile = d[:, None] * N + n[None, :]
    w = tl.load(w_ptr + d[:, None] * R + r[None, :], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + tile, mask=mask_dn, other=0.0) * LOG2_E
    skip = tl.load(d_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    slots = tl.load(slots_ptr + b, mask=mask_b, other=0)
    home = state_ptr + (slots * state_stride)[:, None, None] + tile[None, :, :]
    h = tl.load(home, mask=mask, other=0.0).to(tl.float32)
    await_inputs(PDL)
    row = b.to(tl.int64)[:, None]
    source = low_ptr + row * (R + 2 * N)
    low = tl.load(source + r[None, :], mask=mask_b[:, None] & mask_r[None, :], other=0.0)
    x = tl.load(xz_ptr + row * 2 * dim + d[None, :], mask=mask_bd, other=0.0).to(tl.float32)
    z = tl.load(xz_ptr + row * 2 * dim + dim + d[None, :], mask=mask_bd, other=0.0).to(tl.float32)
    in_gain = tl.load(source + R + n[None, :], mask=mask_bn, other=0.0)
    out_gain = tl.load(source + R + N + n[None, :], mask=mask_bn, other=0.0)
    if NORM:
        in_gain = in_gain / tl.sqrt(tl.sum(in_gain * in_gain, axis=1) / N + eps)[:, None]
        out_gain = out_gain / tl.sqrt(tl.sum(out_gain * out_gain, axis=1) / N + eps)[:, None]
        low = low / tl.sqrt(tl.sum(low * low, axis=1) / R + eps)[:, None]
    delta = tl.trans(tl.dot(w, tl.trans(low.to(w.dtype)))) + bias[None, :]  # [BLOCK_B, BLOCK_D]
    delta = softplus(delta)
    h = tl.exp2(delta[:, :, None] * a[None, :, :]) * h + (delta * x)[:, :, None] * in_gain[:, None, :]
    y = tl.sum(h * out_gain[:, None, :], axis=2) + skip[None, :] * x
    y = y * (z * sigmoid(z))
    # every thread has read what was there, also one that holds an element beside others
    tl.debug_barrier()
    tl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + row * dim + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask_bd)
