"""Weights in int8, one scale per output: half the memory of bfloat16, and half the bytes of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core import ops

if TYPE_CHECKING:
    from mamba_core.modeling_mamba import MambaForCausalLM

# the small matrix behind dt stays as it is
_MATRICES = ("in_proj", "x_proj", "out_proj")
# weights that are quantized at a time, which takes several times their memory
_PIECE = 2**19


class Int8Linear(nn.Module):
    """A linear layer whose weight is round(w / scale) in int8, scale being the output's largest |w| / 127."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        rounded = torch.empty_like(weight, dtype=torch.int8)
        scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        rows = max(1, _PIECE // weight.shape[1])
        for begin in range(0, len(weight), rows):
            piece = slice(begin, begin + rows)
            _quantize(weight[piece], rounded[piece], scales[piece])
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [*, K] -> [*, N] in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.is_cuda:
            # a pass over the weights costs less than one over the outputs of many rows
            from mamba_core.ops.triton.quantized import dequantize

            return F.linear(x, dequantize(self.weight, self.scales, x.dtype), bias)
        if ops.has_machine_code(x):
            from mamba_core.ops.numba_ops import quantized

            return F.linear(x, quantized.dequantize(self.weight, self.scales, x.dtype), bias)
        # what int8 holds is exact in any of the types
        y = F.linear(x, self.weight.to(x.dtype)).float() * self.scales
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def _quantize(weight: Tensor, rounded: Tensor, scales: Tensor) -> None:
    weight = weight.float()
    # an output of zeros keeps them
    scales.copy_(weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127)
    rounded.copy_((weight / scales[:, None]).round().clamp(-127, 127))


@torch.no_grad()
def quantize_int8(model: MambaForCausalLM) -> None:
    """Replace the large matrices of a model, for good; embeddings that are the head as well are kept beside it.

    One after the other, where they are: on the way there is never more than one of them beside what there was.
    """
    for layer in model.backbone.layers:
        for name in _MATRICES:
            setattr(layer.mixer, name, Int8Linear(getattr(layer.mixer, name)))
    model.add_module("lm_head", Int8Linear(model.lm_head))
