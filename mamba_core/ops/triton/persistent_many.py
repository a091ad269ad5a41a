"""One token each of up to 64 sequences through all layers in a single launch: what its kernels are launched with.

``persistent_wide`` and ``persistent_narrow`` plan such launches for their kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_core.ops.triton.persistent_step import Weights, kind, launch
from mamba_core.ops.triton.persistent_wide_tiles import Sizes

# a product's operand is so high
MAX_ROWS = 64
# columns of a tile
DEEP = 64
# the states that a program moves on, 16 bytes to a thread and 4 threads to a channel
STATES = 16
# warps that copy weights, and as many that copy inputs
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

    room = partial(torch.empty, dtype=torch.float32, device=device)
    shares, parts = [room(*shape) for shape in planned.shares], [room(*shape) for shape in planned.parts]
    low, dt = room(MAX_ROWS, low_width), room(MAX_ROWS, low_width, dtype=torch.bfloat16)
    y, gained = room(rows, 2 * width, dtype=torch.bfloat16), room(rows, width, dtype=torch.bfloat16)
    squares = room(planned.groups, MAX_ROWS)
    launch(
        planned.kernel,
        (planned.programs,),
        weights,
        (tokens, embeddings, gain, slots, conv_state, ssm_state),
        (*shares, low, dt, y, *parts, gained, squares, counters, rows),
        (eps,),
        planned.sizes._replace(**kind(layer, conv_state)),
    )
    return gained, squares if rows == MAX_ROWS else squares[:, :rows].contiguous()
