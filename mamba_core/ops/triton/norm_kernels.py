"""RMSNorm, alone and fused with the residual add, forward and backward: Triton kernels over [ROWS, BLOCK_H] tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    scale_ptr,
    num_rows,
    width,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y and, with a residual, total = residual + x, both [T, H] contiguous; scale [T] = 1 / rms if kept."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK_H)
    mask_row = row < num_rows
    mask_h = h < width
    mask = mask_row[:, None] & mask_h[None, :]
    out = row[:, None] * width + h[None, :]
    v = tl.load(x_ptr + row[:, None] * x_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual_ptr + row[:, None] * residual_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
        # the norm is of what is kept, also where that is narrower than fp32
        kept = v.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, kept, mask=mask)
        v = kept.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / width + eps)
    y = v * scale[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    if KEEP_SCALE:
        tl.store(scale_ptr + row, scale, mask=mask_row)


@triton.jit(do_not_specialize=["num_rows"])
def norm_backward_kernel(
    v_ptr,
    scale_ptr,
    weight_ptr,
    dy_ptr,
    dtotal_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    num_rows,
    width,
    v_stride,
    dy_stride,
    dtotal_stride,
    HAS_TOTAL: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dx [T, H], the same in the residual's dtype if there is one, and each program's share of dweight [programs, H].

    v is what was normed; dtotal the gradient that reaches it from elsewhere.
    """
    h = tl.arange(0, BLOCK_H)
    mask_h = h < width
    dweight = tl.zeros([BLOCK_H], dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + h, mask=mask_h, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask_row = row < num_rows
        mask = mask_row[:, None] & mask_h[None, :]
        v = tl.load(v_ptr + row[:, None] * v_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=mask_row, other=0.0)
        unit = v * scale[:, None]
        if HAS_WEIGHT:
            dweight += tl.sum(dy * unit, axis=0)
            dy = dy * weight[None, :]
        along = tl.sum(dy * unit, axis=1) / width
        dv = (dy - unit * along[:, None]) * scale[:, None]
        if HAS_TOTAL:
            dv += tl.load(dtotal_ptr + row[:, None] * dtotal_stride + h[None, :], mask=mask, other=0.0).to(tl.float32)
        out = row[:, None] * width + h[None, :]
        tl.store(dx_ptr + out, dv.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_RESIDUAL:
            tl.store(dresidual_ptr + out, dv.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0) * width + h, dweight, mask=mask_h)
