"""Matrix products of many rows, by whichever of torch's own is fastest on this machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.ops import native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [*, K], weight [N, K], bias [N] -> x @ weight^T + bias [*, N], as torch's function of this name has it."""
    if _suits_onednn(x, weight, bias) and native.prefers_onednn():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    tensors = [t for t in (x, weight, bias) if t is not None]
    return (
        x.numel() > 0
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and weight.is_contiguous()
        # it has no gradient
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


class Linear(torch.nn.Linear):
    """torch's layer, whose product is ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
