"""A Mamba in plain torch and fp32, one token after the other: what the numerics of every other path are held against.

Nothing here is shared with the model that serves but its weights. The equations are those of Gu & Dao 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.mixer import MambaMixer
from mamba_core.modeling_mamba import MambaBlock, MambaForCausalLM

Product = Callable[[Tensor, Tensor], Tensor]


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [*, K] times weight [M, K], transposed, in fp32."""
    return F.linear(x, weight)


def bf16_product(x: Tensor, weight: Tensor) -> Tensor:
    """The same with operands and result in bf16, as a model of that type multiplies."""
    return F.linear(x.bfloat16(), weight.bfloat16()).float()


@dataclass(slots=True)
class PlainState:
    """conv [layers, B, K-1, D], the last inputs of each convolution; ssm [layers, B, D, N]."""

    conv: Tensor
    ssm: Tensor

    @classmethod
    def join(cls, states: list[PlainState]) -> PlainState:
        """The rows of all states, one after the other."""
        return cls(torch.cat([s.conv for s in states], 1), torch.cat([s.ssm for s in states], 1))


class PlainMamba:
    """The weights of a model, upcast to fp32, under another implementation. ``product`` multiplies all matrices."""

    def __init__(self, model: MambaForCausalLM, product: Product = exact_product) -> None:
        self._model = model
        self._product = product
        self._weights: dict[int, Tensor] = {}

    def fresh_state(self, num_rows: int) -> PlainState:
        config = self._model.config
        device = self._model.lm_head.weight.device
        layers, channels = config.num_hidden_layers, config.intermediate_size
        conv = torch.zeros(layers, num_rows, config.conv_kernel - 1, channels, device=device)
        return PlainState(conv, torch.zeros(layers, num_rows, channels, config.state_size, device=device))

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, state: PlainState) -> Tensor:
        """tokens [B, L] -> hidden states [B, L, H], after the final norm; ``state`` moves on."""
        backbone = self._model.backbone
        residual = F.embedding(tokens, backbone.embeddings.weight).float()
        for index, block in enumerate(backbone.layers):
            assert isinstance(block, MambaBlock)
            normed = _norm(residual, self._float(block.norm.weight), block.norm.eps)
            residual = residual + self._mix(block.mixer, normed, state.conv[index], state.ssm[index])
        return _norm(residual, self._float(backbone.norm_f.weight), backbone.norm_f.eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [*, H] -> [*, V]."""
        return self._product(hidden, self._float(self._model.lm_head.weight))

    def _mix(self, mixer: MambaMixer, normed: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        x, z = self._multiply(normed, mixer.in_proj).chunk(2, -1)  # [B, L, D]
        window = torch.cat([conv, x], 1)
        conv.copy_(window[:, -conv.shape[1] :])
        taps = self._float(mixer.conv1d.weight).squeeze(1)  # [D, K]
        x = (window.unfold(1, taps.shape[1], 1) * taps).sum(-1)
        x = F.silu(x if mixer.conv1d.bias is None else x + self._float(mixer.conv1d.bias))
        dt, B, C = torch.split(self._multiply(x, mixer.x_proj), [mixer.rank, mixer.states, mixer.states], -1)
        if mixer.inner_norm_eps is not None:
            dt, B, C = (_norm(part, None, mixer.inner_norm_eps) for part in (dt, B, C))
        dt = F.softplus(self._product(dt, self._float(mixer.dt_proj.weight)) + self._float(mixer.dt_proj.bias))
        y = _scan(x, dt, -torch.exp(mixer.A_log.float()), B, C, ssm) + mixer.D.float() * x
        return self._multiply(y * F.silu(z), mixer.out_proj)

    def _multiply(self, x: Tensor, linear: torch.nn.Linear) -> Tensor:
        y = self._product(x, self._float(linear.weight))
        return y if linear.bias is None else y + self._float(linear.bias)

    def _float(self, weight: Tensor) -> Tensor:
        if id(weight) not in self._weights:
            self._weights[id(weight)] = weight.detach().float()
        return self._weights[id(weight)]


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Tensor:
    """x, dt [B, L, D]; A [D, N]; B, C [B, L, N]; h [B, D, N], which moves on. Returns [B, L, D]."""
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h.mul_(torch.exp(step * A)).add_(step * x[:, t, :, None] * B[:, t, None])
        outputs.append((h * C[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)
