"""Matrices that may be in int8 with a scale per output, and their widening for products of many rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn

from mamba_core.ops.triton.quantized_kernels import dequantize_kernel

_MOST_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [out, in] in the type of the activations, or in int8 with scales [out] fp32."""

    weight: Tensor
    scales: Tensor | None = None

    @classmethod
    def of(cls, linear: nn.Module) -> Matrix:
        """That of an ``nn.Linear`` or an ``Int8Linear``."""
        weight, scales = linear.weight, getattr(linear, "scales", None)
        assert isinstance(weight, Tensor)
        return cls(weight, scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def pointers(self) -> tuple[Tensor, Tensor]:
        """The weight, and the scales or what stands in for them."""
        return self.weight, self.weight if self.scales is None else self.scales

    def transposed(self, dtype: torch.dtype) -> Tensor:
        """[in, out] in a type that the library multiplies; of int8, for as long as it does."""
        return (self.weight if self.scales is None else dequantize(self.weight, self.scales, dtype)).T


def dequantize(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [out, in] int8, scales [out] fp32 -> their products, of a type."""
    rows, width = weight.shape
    y = torch.empty((rows, width), dtype=dtype, device=weight.device)
    block = min(triton.next_power_of_2(width), _MOST_AT_ONCE)
    dequantize_kernel[(rows, triton.cdiv(width, block))](weight, scales, y, width, BLOCK=block, num_warps=4)
    return y
