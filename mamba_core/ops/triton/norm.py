"""RMSNorm on the GPU: launches, and the autograd functions around them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_core.ops.triton.layout import as_rows
from mamba_core.ops.triton.norm_kernels import norm_backward_kernel, norm_kernel

_TILE_ELEMENTS = 2048
# programs that share out the rows in the backward pass: bounds the partial sums of the weight's gradient
_BACKWARD_PROGRAMS = 512


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ``mamba_core.ops.rms_norm``."""
    x = as_rows(x)
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RMSNorm.apply(x, weight, eps)
    return _forward(x, None, weight, eps, x.dtype, keep_scale=False)[0]


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``mamba_core.ops.rms_norm_residual``."""
    x, residual = as_rows(x), as_rows(residual)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return _RMSNormResidual.apply(x, residual, weight, eps)
    y, total, _ = _forward(x, residual, weight, eps, weight.dtype, keep_scale=False)
    return y, total


def _tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that holds whole rows."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE_ELEMENTS // columns)
    return rows, columns, 8 if columns >= 4096 else 4


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype, *, keep_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm, residual + x, 1 / rms); the last two stand in for themselves where they are not wanted."""
    num_rows, width = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = y if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device) if keep_scale else y
    rows, columns, warps = _tile(width)
    if num_rows > 0:
        norm_kernel[(triton.cdiv(num_rows, rows),)](
            x,
            x if residual is None else residual,
            x if weight is None else weight,
            y,
            total,
            scale,
            num_rows,
            width,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            KEEP_SCALE=keep_scale,
            ROWS=rows,
            BLOCK_H=columns,
            num_warps=warps,
        )
    return y, total, scale


def _backward(
    v: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dy: Tensor,
    dtotal: Tensor | None,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, residual and weight, given what was normed and the gradients of the norm and of the sum."""
    num_rows, width = v.shape
    rows, columns, warps = _tile(width)
    programs = min(triton.cdiv(num_rows, rows), _BACKWARD_PROGRAMS)
    dx = torch.empty(v.shape, dtype=dtype, device=v.device)
    # one tensor serves both where the dtypes agree
    own = residual_dtype is not None and residual_dtype != dtype
    dresidual = torch.empty(v.shape, dtype=residual_dtype, device=v.device) if own else dx
    dweight = torch.empty((programs, width), dtype=torch.float32, device=v.device)
    if num_rows > 0:
        norm_backward_kernel[(programs,)](
            v,
            scale,
            v if weight is None else weight,
            dy,
            dy if dtotal is None else dtotal,
            dx,
            dresidual,
            dweight,
            num_rows,
            width,
            v.stride(0),
            dy.stride(0),
            0 if dtotal is None else dtotal.stride(0),
            HAS_TOTAL=dtotal is not None,
            HAS_RESIDUAL=own,
            HAS_WEIGHT=weight is not None,
            ROWS=rows,
            BLOCK_H=columns,
            num_warps=warps,
        )
    gweight = None if weight is None else dweight.sum(0).to(weight.dtype)
    return dx, None if residual_dtype is None else dresidual, gweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, _, scale = _forward(x, None, weight, eps, x.dtype, keep_scale=True)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        dx, _, dweight = _backward(x, scale, weight, as_rows(dy), None, x.dtype, None)
        return dx, dweight, None


class _RMSNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, scale = _forward(x, residual, weight, eps, weight.dtype, keep_scale=True)
        ctx.save_for_backward(total, scale, weight)
        ctx.dtype = x.dtype
        # an output that nobody used has no gradient to add
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, scale, weight = ctx.saved_tensors
        if dy is None:
            if dtotal is None:
                return None, None, None, None
            return dtotal.to(ctx.dtype), dtotal, None, None
        dtotal = None if dtotal is None else as_rows(dtotal)
        dx, dresidual, dweight = _backward(total, scale, weight, as_rows(dy), dtotal, ctx.dtype, total.dtype)
        return dx, dresidual, dweight, None
