"""Launches for states that lack a token; see ``mamba_core.ops.lag``."""

from __future__ import annotations

import triton
from torch import Tensor

from mamba_core.ops.lag import Lag
from mamba_core.ops.triton.persistent_step import Weights
from mamba_core.ops.triton.step_lag_kernels import settle_kernel, turn_kernel

_BLOCK_B = 128
_BLOCK_D = 256


def turn(slots: Tensor, lag: Lag) -> None:
    """Behind all layers of a step of slots [B] that was given ``lag``: the phases that follow."""
    rows = slots.shape[0]
    turn_kernel[(triton.cdiv(rows, _BLOCK_B),)](lag.phases, slots, rows, BLOCK_B=_BLOCK_B)


def settle(weights: Weights, states: Tensor, lag: Lag, slots: Tensor) -> None:
    """Have the states [layers, S, D, N] fp32 of slots [B] int64, each once, lack nothing."""
    layers, _, dim, num_states = states.shape
    settle_kernel[(triton.cdiv(dim, _BLOCK_D), slots.shape[0], layers)](
        weights.table,
        weights.layers[0].dt_bias,
        states,
        lag.inputs,
        lag.b,
        lag.phases,
        slots,
        dim,
        states.stride(0),
        lag.inputs.stride(0),
        lag.b.stride(0),
        N=num_states,
        BLOCK_N=triton.next_power_of_2(num_states),
        BLOCK_D=_BLOCK_D,
        num_warps=4,
    )
    lag.phases.index_fill_(0, slots, 0)
