"""Causal convolution on the GPU: launches, and the autograd function around them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_core.ops.packing import Packing
from mamba_core.ops.triton.conv_backward_kernels import (
    conv_backward_head_kernel,
    conv_backward_input_kernel,
    conv_backward_weight_kernel,
)
from mamba_core.ops.triton.conv_kernels import conv_kernel, conv_step_kernel
from mamba_core.ops.triton.layout import as_rows, is_tap_major

# a warp walks down a strip of tokens, four channels a lane, and reads each input once
_STRIPS = 4
_STRIP = 8
_BLOCK_T = 16
_BLOCK_D = 128
_WARPS = 4
# of one token a row: a warp has a row, eight channels a lane
_STEP_B = 4
_STEP_D = 512
# programs that share out the tokens of a weight gradient: bounds the partial sums
_BACKWARD_PROGRAMS = 256


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, packing: Packing) -> Tensor:
    """See ``mamba_core.ops.causal_conv1d``."""
    is_tap_major(state)
    if packing.num_tokens == 0:
        return torch.empty_like(x)
    x, weight = as_rows(x), weight.contiguous()
    wanted = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in wanted):
        return _CausalConv.apply(x, weight, bias, state, packing)
    return _forward(x, weight, bias, state, packing)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, packing: Packing) -> Tensor:
    dim, width = weight.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strips = triton.cdiv(packing.num_tokens, _STRIPS * _STRIP)
    conv_kernel[(packing.num_rows + strips, triton.cdiv(dim, _BLOCK_D))](
        x,
        weight,
        weight if bias is None else bias,
        y,
        state,
        packing.slots,
        packing.seq_idx,
        packing.cu_seqlens,
        packing.num_tokens,
        packing.num_rows,
        dim,
        x.stride(0),
        y.stride(0),
        state.stride(0),
        K=width,
        TAP_MAJOR=is_tap_major(state),
        HAS_BIAS=bias is not None,
        STRIPS=_STRIPS,
        STRIP=_STRIP,
        BLOCK_D=_BLOCK_D,
        num_warps=_WARPS,
    )
    return y


class _CausalConv(torch.autograd.Function):
    """Keeps x and a copy of the states the sequences started from; the state itself takes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, packing: Packing) -> Tensor:
        history = state[packing.slots].contiguous()
        y = _forward(x, weight, bias, state, packing)
        ctx.save_for_backward(x, weight, bias, history)
        ctx.packing = packing
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, history = ctx.saved_tensors
        return *_backward(x, weight, bias, history, ctx.packing, as_rows(dy)), None, None


def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, packing: Packing, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    dim, width = weight.shape
    token_blocks, channel_blocks = triton.cdiv(packing.num_tokens, _BLOCK_T), triton.cdiv(dim, _BLOCK_D)
    programs = min(token_blocks, _BACKWARD_PROGRAMS)
    heads = min(packing.num_rows, _BACKWARD_PROGRAMS)
    dpre = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    # shares of the programs of the first kernel, then of those of the second
    dweight = torch.empty((programs + heads, width, dim), dtype=torch.float32, device=x.device)
    dbias = torch.empty((programs + heads, dim), dtype=torch.float32, device=x.device)
    conv_backward_weight_kernel[(programs, channel_blocks)](
        x,
        weight,
        weight if bias is None else bias,
        dy,
        packing.seq_idx,
        packing.cu_seqlens,
        dpre,
        dweight,
        dbias,
        packing.num_tokens,
        dim,
        x.stride(0),
        dy.stride(0),
        0,
        K=width,
        BLOCK_K=triton.next_power_of_2(width),
        HAS_BIAS=bias is not None,
        BLOCK_T=_BLOCK_T,
        BLOCK_D=_BLOCK_D,
        num_warps=_BLOCK_D // 32,
    )
    conv_backward_head_kernel[(heads, channel_blocks)](
        x,
        weight,
        weight if bias is None else bias,
        dy,
        history,
        packing.cu_seqlens,
        dpre,
        dweight[programs:],
        dbias[programs:],
        packing.num_rows,
        dim,
        x.stride(0),
        dy.stride(0),
        history.stride(0),
        0,
        K=width,
        BLOCK_K=triton.next_power_of_2(width),
        HAS_BIAS=bias is not None,
        BLOCK_D=_BLOCK_D,
        num_warps=_BLOCK_D // 32,
    )
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    conv_backward_input_kernel[(token_blocks, channel_blocks)](
        dpre,
        weight,
        dx,
        packing.seq_idx,
        packing.cu_seqlens,
        packing.num_tokens,
        dim,
        K=width,
        BLOCK_T=_BLOCK_T,
        BLOCK_D=_BLOCK_D,
        num_warps=_WARPS,
    )
    dw = dweight.sum(0).T.to(weight.dtype)
    return dx, dw, None if bias is None else dbias.sum(0).to(bias.dtype)


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor) -> Tensor:
    """See ``mamba_core.ops.causal_conv1d_step``."""
    x = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    convolve_step(x, weight.contiguous(), bias, state, slots, y, {"PDL": False})
    return y


def convolve_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    y: Tensor,
    options: dict[str, bool],
) -> None:
    """``causal_conv1d_step`` of rows with contiguous channels into y [B, D], which may be x.

    options: of the launch, and with PDL whether to start while the kernel before, which makes x, still runs.
    """
    dim, width = weight.shape
    conv_step_kernel[(triton.cdiv(x.shape[0], _STEP_B), triton.cdiv(dim, _STEP_D))](
        x,
        weight,
        weight if bias is None else bias,
        y,
        state,
        slots,
        x.shape[0],
        dim,
        x.stride(0),
        y.stride(0),
        state.stride(0),
        K=width,
        BLOCK_K=triton.next_power_of_2(width),
        TAP_MAJOR=is_tap_major(state),
        HAS_BIAS=bias is not None,
        BLOCK_B=_STEP_B,
        BLOCK_D=_STEP_D,
        num_warps=_WARPS,
        **options,
    )
