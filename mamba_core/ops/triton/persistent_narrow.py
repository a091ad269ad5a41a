"""One token each of up to 64 sequences through all layers of a narrow model in a single launch."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_core.ops.triton.persistent_narrow_kernel import persistent_narrow_kernel
from mamba_core.ops.triton.persistent_step import Weights, launch_basics

# a product's operand is so high
MAX_ROWS = 64
# the programs of a group share its outputs; those of a program; columns of a tile, and of what its warps take at a time
_SPLITS = 4
_OUTPUTS = 32
_DEEP = 64
_WIDE = 512
# the states that a program moves on, 16 bytes to a thread and 4 threads to a channel
_STATES = 16
# warps of the step itself, warps that copy weights, and as many that copy inputs
WARPS = 8
_COPIERS = 2
# shared memory of a multiprocessor, less what the barriers and the compiler need
_SHARED_BYTES = 227 * 1024 - 2048


def fits(width: int, rank: int, states: int) -> bool:
    """Whether layers of these sizes can be shared out among the programs."""
    low_programs = (rank + 2 * states) // 16 * (MAX_ROWS // 8)
    return (
        width % (_WIDE // 2) == 0
        and rank % 16 == 0
        and rank <= _DEEP
        and states == _STATES
        and low_programs <= programs(width)
        and width // _OUTPUTS <= 32
        and _stages(width) > 1
    )


def programs(width: int) -> int:
    """How many programs a launch has, all of which must run at once."""
    return _SPLITS * (width // _OUTPUTS)


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
    counters int32, of which the first is used, zero before and after. B is at most MAX_ROWS; there is no inner norm.
    """
    assert inner_eps is None
    layer, device, rows = weights.layers[0], embeddings.device, len(tokens)
    width, rank, states, taps = layer.sizes()
    low_width = rank + 2 * states

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    gained, squares = room(rows, width, dtype=torch.bfloat16), room(width // _OUTPUTS, MAX_ROWS)
    persistent_narrow_kernel[(programs(width),)](
        weights.table,
        tokens,
        embeddings,
        gain,
        slots,
        conv_state,
        ssm_state,
        room(MAX_ROWS, low_width),
        room(MAX_ROWS, low_width, dtype=torch.bfloat16),
        room(rows, 2 * width, dtype=torch.bfloat16),
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
    space = 32 if rows <= 32 else MAX_ROWS
    stages = _stages(width)
    return {
        "H": width,
        "D": 2 * width,
        "R": rank,
        "N": _STATES,
        "K": taps,
        "A": _OUTPUTS,
        "SPACE": space,
        "STAGES": stages,
        "FREED": stages // 2,
        "COPIERS": _COPIERS,
        "AHEAD": 3,
        "MIDDLE": space // 16,
    }


def _stages(width: int) -> int:
    """How many tiles the rings hold, which turn a whole number of times: as many as there is room for."""
    outs = _OUTPUTS * 2 * width * 2
    kept = MAX_ROWS * (_OUTPUTS * (4 + 1 + 2 + 2 + 1) + 2 * _STATES * 4) + WARPS * _OUTPUTS * (MAX_ROWS // _SPLITS) * 4
    most = (_SHARED_BYTES - outs - kept) // ((MAX_ROWS + _OUTPUTS) * _DEEP * 2)
    return max((i for i in range(1, most + 1) if width // _DEEP % i == 0), default=0)
