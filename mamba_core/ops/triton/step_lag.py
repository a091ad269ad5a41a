"""Launches for states that lack a token; see ``mamba_core.ops.lag``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mamba_core.ops.lag import Lag
from mamba_core.ops.triton.step_lag_kernels import settle_kernel, turn_kernel

_BLOCK_B = 128
_BLOCK_D = 256


@dataclass(frozen=True, slots=True)
class Recurrences:
    """What the recurrence of each layer depends on, and a table [layers, 2] int64 of where that is."""

    decays: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    table: Tensor


def locate(decays: Sequence[Tensor], biases: Sequence[Tensor], known: Recurrences | None) -> Recurrences:
    """A [D, N] fp32 and dt_proj's bias [D] of each layer; ``known`` itself as long as it is still true."""
    addresses = tuple(tensor.data_ptr() for pair in zip(decays, biases, strict=True) for tensor in pair)
    if known is not None and known.addresses == addresses:
        return known
    table = torch.tensor(addresses, dtype=torch.int64).view(-1, 2).to(decays[0].device)
    return Recurrences(tuple(decays), tuple(biases), addresses, table)


def turn(slots: Tensor, lag: Lag) -> None:
    """Behind all layers of a step of slots [B] that was given ``lag``: the phases that follow."""
    rows = slots.shape[0]
    turn_kernel[(triton.cdiv(rows, _BLOCK_B),)](lag.phases, slots, rows, BLOCK_B=_BLOCK_B)


def settle(recurrences: Recurrences, states: Tensor, lag: Lag, slots: Tensor) -> None:
    """Have the states [layers, S, D, N] fp32 of slots [B] int64, each once, lack nothing."""
    layers, _, dim, num_states = states.shape
    settle_kernel[(triton.cdiv(dim, _BLOCK_D), slots.shape[0], layers)](
        recurrences.table,
        recurrences.biases[0],
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
