"""One token each of up to 64 sequences through all layers in a single launch: what its kernels are launched with.

``persistent_wide`` and ``persistent_narrow`` plan such launches for their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba_core.ops.triton.persistent_step import Weights, kind
from mamba_core.ops.triton.persistent_wide_tiles import Sizes

# a product's operand is so high
MAX_ROWS = 64
# columns of a tile
DEEP = 64
# the states that a program moves on, 16 bytes to a thread and 4 threads to a channel
STATES = 16
# warps of the step itself, warps that copy weights, and as many that copy inputs
WARPS = 8
COPIERS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """A kernel, its programs, the groups of them that make squares, and its sizes.

    shares and parts are the shapes of fp32 rooms that some kernels have beside those of all.
    """

    kernel: Any
    programs: int
    groups: int
    sizes: Sizes
    shares: tuple[tuple[int, ...], ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()


def step(
    plan: Callable[[int, tuple[int, int, int, int]], Plan],
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

    plan: of B, and of a layer's sizes. embeddings [V, H]; gain [H] of the first norm; conv_state [layers, S, D, K-1],
    ssm_state [layers, S, D, N]; counters [MAX_TILES] int32, zero before and after. B is at most MAX_ROWS; there is no
    inner norm.
    """
    assert inner_eps is None
    layer, device, rows = weights.layers[0], embeddings.device, len(tokens)
    width, rank, states, _ = layer.sizes()
    low_width = rank + 2 * states
    planned = plan(rows, layer.sizes())

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    gained, squares = room(rows, width, dtype=torch.bfloat16), room(planned.groups, MAX_ROWS)
    planned.kernel[(planned.programs,)](
        weights.table,
        tokens,
        embeddings,
        gain,
        slots,
        conv_state,
        ssm_state,
        *(room(*shape) for shape in planned.shares),
        room(MAX_ROWS, low_width),
        room(MAX_ROWS, low_width, dtype=torch.bfloat16),
        room(rows, 2 * width, dtype=torch.bfloat16),
        *(room(*shape) for shape in planned.parts),
        gained,
        squares,
        counters,
        rows,
        len(weights.layers),
        *conv_state.stride()[:2],
        *ssm_state.stride()[:2],
        eps,
        SIZES=planned.sizes._replace(**kind(layer, conv_state)),
        num_warps=WARPS,
        # all programs at once or none: they wait for each other
        launch_cooperative_grid=True,
    )
    return gained, squares if rows == MAX_ROWS else squares[:, :rows].contiguous()
