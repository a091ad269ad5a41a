"""Matrices in int8 with a scale per output, widened for products of many rows."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mamba_core.ops.triton.quantized_kernels import dequantize_kernel

_MOST_AT_ONCE = 4096


def dequantize(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [out, in] int8, scales [out] fp32 -> their products, of a type."""
    rows, width = weight.shape
    y = torch.empty((rows, width), dtype=dtype, device=weight.device)
    block = min(triton.next_power_of_2(width), _MOST_AT_ONCE)
    dequantize_kernel[(rows, triton.cdiv(width, block))](weight, scales, y, width, BLOCK=block, num_warps=4)
    return y
