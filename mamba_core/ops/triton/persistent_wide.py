"""One token each of up to 64 sequences through all layers in a single launch, where weights are large enough to pay."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mamba_core.ops.triton.persistent_step import Weights, launch_basics
from mamba_core.ops.triton.persistent_wide_kernel import persistent_wide_kernel

# a product's operand is so high
MAX_ROWS = 64
# programs, each on a multiprocessor of its own, and groups of those that share their outputs; columns of a tile
PROGRAMS = 128
_GROUPS = 32
_DEEP = 64
# the states that a program moves on, 16 bytes to a thread and 4 threads to a channel
_STATES = 16
# more do not find room in the shared memory of a multiprocessor
_MAX_STAGES = 10
# warps of the step itself, warps that copy weights, and as many that copy inputs
WARPS = 8
_COPIERS = 2


def fits(width: int, rank: int, states: int) -> bool:
    """Whether layers of these sizes can be shared out among the programs."""
    high, low = _outputs(width)
    small_tiles = triton.cdiv(rank + 2 * states, high) + triton.cdiv(rank, _DEEP)
    return (
        width % (4 * _DEEP) == 0
        and 32 <= high <= 64
        and low in (0, 16)
        and rank % 16 == 0
        and states == _STATES
        and (rank + 2 * states) * MAX_ROWS <= 128 * PROGRAMS
        and small_tiles <= _stages(width)
    )


def programs(_width: int) -> int:
    """How many programs a launch has, all of which must run at once: as many for every width."""
    return PROGRAMS


def step(
    weights: Weights,
    tokens: Tensor,
    embeddings: Tensor,
    gain: Tensor,
    slots: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    counters: Tensor,
    eps: float,
    inner_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """tokens, slots [B] -> the last residuals times their norm's weight [B, H], and their squares in [shares, B].

    embeddings [V, H]; gain [H] of the first norm; conv_state [layers, S, D, K-1], ssm_state [layers, S, D, N];
    counters [MAX_TILES] int32, zero before and after. B is at most MAX_ROWS; there is no inner norm.
    """
    assert inner_eps is None
    layer, device, rows = weights.layers[0], embeddings.device, len(tokens)
    width, rank, states, taps = layer.sizes()
    low_width = rank + 2 * states

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    gained, squares = room(rows, width, dtype=torch.bfloat16), room(_GROUPS, MAX_ROWS)
    persistent_wide_kernel[(PROGRAMS,)](
        weights.table,
        tokens,
        embeddings,
        gain,
        slots,
        conv_state,
        ssm_state,
        room(PROGRAMS, MAX_ROWS, low_width),
        room(MAX_ROWS, low_width),
        room(MAX_ROWS, low_width, dtype=torch.bfloat16),
        room(rows, 2 * width, dtype=torch.bfloat16),
        room(PROGRAMS // _GROUPS, MAX_ROWS, width),
        gained,
        squares,
        counters,
        rows,
        len(weights.layers),
        *conv_state.stride()[:2],
        *ssm_state.stride()[:2],
        eps,
        **launch_constants(rows, width, rank, taps),
        **launch_basics(layer, conv_state, WARPS),
    )
    return gained, squares if rows == MAX_ROWS else squares[:, :rows].contiguous()


def launch_constants(rows: int, width: int, rank: int, taps: int) -> dict[str, int]:
    """What the kernel is compiled for besides the kind of model: its sizes, and how they are shared out."""
    high, low = _outputs(width)
    stages = _stages(width)
    return {
        "H": width,
        "D": 2 * width,
        "R": rank,
        "N": _STATES,
        "K": taps,
        "A": high,
        "B": low,
        "SPACE": 32 if rows <= 32 else 64,
        "STAGES": stages,
        "COPIERS": _COPIERS,
        "AHEAD": stages // 2,
        "DEPTH": 2,
    }


def _stages(width: int) -> int:
    """How many tiles the rings hold: both turn a whole number of times in each of the large products."""
    tiles = width // (2 * _DEEP)
    return tiles if tiles <= _MAX_STAGES else tiles // 2


def _outputs(width: int) -> tuple[int, int]:
    """The outputs of a program, as a power of two and the rest."""
    outputs = width // _GROUPS
    high = 1 << max(0, outputs.bit_length() - 1)
    return high, outputs - high
