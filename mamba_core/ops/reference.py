"""The ops in plain torch, one token at a time: the meaning every backend is tested against. Never used to serve."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.ops.packing import Packing


def _spans(packing: Packing) -> list[tuple[int, int, int]]:
    """(slot, begin, end) of each sequence."""
    bounds = packing.cu_seqlens.tolist()
    return [(slot, bounds[i], bounds[i + 1]) for i, slot in enumerate(packing.slots.tolist())]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, packing: Packing) -> Tensor:
    outputs = []
    for slot, begin, end in _spans(packing):
        if begin == end:
            continue
        window = torch.cat([state[slot].T.to(x.dtype), x[begin:end]])  # [K-1+L, D]
        taps = window.float().unfold(0, weight.shape[1], 1)  # [L, D, K]
        y = (taps * weight.float()).sum(-1)
        if bias is not None:
            y = y + bias.float()
        outputs.append(F.silu(y).to(x.dtype))
        state[slot] = window[end - begin :].detach().T.to(state.dtype)
    return torch.cat(outputs) if outputs else torch.empty_like(x)


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, state, Packing.step(slots))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    packing: Packing,
) -> Tensor:
    outputs = []
    for slot, begin, end in _spans(packing):
        h = state[slot].float().clone()  # [D, N]
        for t in range(begin, end):
            xt, zt = x[t].float(), z[t].float()  # [D]
            delta = F.softplus(dt[t].float() + dt_bias.float())
            h = torch.exp(delta[:, None] * A) * h + (delta * xt)[:, None] * B[t].float()
            y = (h * C[t].float()).sum(-1) + D.float() * xt
            outputs.append((y * F.silu(zt)).to(x.dtype))
        state[slot] = h.detach().to(state.dtype)
    return torch.stack(outputs) if outputs else torch.empty_like(x)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    return selective_scan(x, dt, A, B, C, D, z, dt_bias, state, Packing.step(slots))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = (residual.float() + x.float()).to(residual.dtype)
    return rms_norm(total.float(), weight, eps).to(weight.dtype), total
