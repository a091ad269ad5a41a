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


class Int8Linear(nn.Module):
    """A linear layer whose weight is round(w / scale) in int8, scale being the output's largest |w| / 127."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # an output of zeros keeps them
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [*, K] -> [*, N] in x's dtype."""
        if ops.has_machine_code(x):
            from mamba_core.ops.numba_ops import quantized

            return F.linear(x, quantized.dequantize(self.weight, self.scales, x.dtype), self.bias)
        y = F.linear(x, self.weight.to(x.dtype)).float() * self.scales
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


@torch.no_grad()
def quantize_int8(model: MambaForCausalLM) -> None:
    """Replace the large matrices of a model, for good; embeddings that are the head as well are kept beside it."""
    for layer in model.backbone.layers:
        for name in _MATRICES:
            setattr(layer.mixer, name, Int8Linear(getattr(layer.mixer, name)))
    model.add_module("lm_head", Int8Linear(model.lm_head))
