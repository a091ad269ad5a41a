"""The selective state space layer, its norm, and how both begin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mamba_core import ops
from mamba_core.bases import init
from mamba_core.configuration_mamba import MambaConfig
from mamba_core.ops import Packing
from mamba_core.ops.products import Linear, linear


class MambaRMSNorm(nn.Module):
    """Root-mean-square norm, alone or fused with the addition to the residual."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, H] and the residual so far -> (the norm of their sum, their sum in the residual's dtype)."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.rms_norm_residual(x, residual, self.weight, self.eps)


class MambaMixer(nn.Module):
    """The selective state space layer (Gu & Dao 2023, section 3), in Falcon's form if ``mixer_rms_eps`` is set."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        channels, rank, states = config.intermediate_size, int(config.time_step_rank), config.state_size
        self.config = config
        self.channels, self.rank, self.states = channels, rank, states
        self.inner_norm_eps: float | None = getattr(config, "mixer_rms_eps", None)
        self.in_proj = Linear(config.hidden_size, 2 * channels, bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            channels,
            channels,
            config.conv_kernel,
            groups=channels,
            padding=config.conv_kernel - 1,
            bias=config.use_conv_bias,
        )
        self.x_proj = Linear(channels, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, channels, bias=True)
        self.A_log = nn.Parameter(torch.empty(channels, states, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.out_proj = Linear(channels, config.hidden_size, bias=config.use_bias)
        self._A: tuple[Tensor, int, Tensor] | None = None
        self._flag_parameters()

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """hidden [T, H] -> [T, H], or [W, H] of the tokens at ``wanted`` [W]; all advance the states.

        Without states, ``packing`` counts its rows 0, 1, ... and starts them from zero.
        """
        if conv_state is None or ssm_state is None:
            conv_state, ssm_state = self._scratch_states(hidden, packing.num_rows)
        is_step = packing.is_step and not torch.is_grad_enabled()
        x, z = self.in_proj(hidden).chunk(2, dim=1)  # [T, D] each
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if is_step:
            x = ops.causal_conv1d_step(x, taps, bias, conv_state, packing.slots)
        else:
            x = ops.causal_conv1d(x, taps, bias, conv_state, packing)
        dt, B, C = self._select(x)
        if is_step:
            y = ops.selective_scan_step(x, dt, self.A(), B, C, self.D, z, self.dt_proj.bias, ssm_state, packing.slots)
        else:
            y = ops.selective_scan(x, dt, self.A(), B, C, self.D, z, self.dt_proj.bias, ssm_state, packing)
        return self.out_proj(y if wanted is None else y.index_select(0, wanted))  # type: ignore[no-any-return]

    def A(self) -> Tensor:
        """-exp(A_log) [D, N] in fp32; kept between calls while evaluating, until ``A_log`` changes."""
        if self.training or torch.is_grad_enabled() or self.A_log.is_inference():
            return -torch.exp(self.A_log.float())
        if self._A is not None:
            # holding on to the memory A was made from keeps its address from being given to something else
            source, version, A = self._A
            if source.data_ptr() == self.A_log.data_ptr() and version == self.A_log._version:
                return A
        A = -torch.exp(self.A_log.float())
        self._A = (self.A_log.detach(), self.A_log._version, A)
        return A

    def train(self, mode: bool = True) -> MambaMixer:
        self._A = None
        self._flag_parameters()
        return super().train(mode)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the input: dt [T, D] before its bias, B [T, N] and C [T, N]."""
        dt, B, C = torch.split(self.x_proj(x), [self.rank, self.states, self.states], dim=-1)
        if self.inner_norm_eps is not None:
            dt, B, C = (ops.rms_norm(part, None, self.inner_norm_eps) for part in (dt, B, C))
        return linear(dt, self.dt_proj.weight), B, C

    def _scratch_states(self, hidden: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        conv = hidden.new_zeros(num_rows, self.channels, self.config.conv_kernel - 1)
        ssm = hidden.new_zeros(num_rows, self.channels, self.states, dtype=torch.float32)
        return conv, ssm

    def _flag_parameters(self) -> None:
        # from_pretrained replaces parameters, so that flags set once would be lost
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


def init_mixer(mixer: MambaMixer) -> None:
    """S4D-real A, D of ones, and a dt whose softplus starts log-uniform in [dt_min, dt_max]."""
    config = mixer.config
    states = torch.arange(1, mixer.states + 1, dtype=torch.float32, device=mixer.A_log.device)
    init.copy_(mixer.A_log, states.log().expand(mixer.channels, -1))
    init.ones_(mixer.D)
    bound = mixer.rank**-0.5 * config.time_step_scale
    if config.time_step_init_scheme == "constant":
        init.constant_(mixer.dt_proj.weight, bound)
    else:
        init.uniform_(mixer.dt_proj.weight, -bound, bound)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    uniform = torch.rand(mixer.channels, dtype=torch.float32, device=mixer.dt_proj.bias.device)
    dt = torch.exp(low + (high - low) * uniform).clamp(min=config.time_step_floor)
    init.copy_(mixer.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    if config.rescale_prenorm_residual:
        init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
        if not getattr(mixer.out_proj.weight, "_is_hf_initialized", False):
            mixer.out_proj.weight /= math.sqrt(config.num_hidden_layers)
