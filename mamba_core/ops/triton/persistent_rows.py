"""One token each of 2 to 16 sequences through all layers in a single launch, where weights are large enough to pay."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mamba_core.ops.triton.persistent_rows_kernel import persistent_rows_kernel
from mamba_core.ops.triton.persistent_step import _SKIP_DTYPES, Weights

MAX_ROWS = 16
# a stage: rows and columns of a weight
_HIGH = 16
_WIDE = 512
_STAGE_BYTES = _HIGH * _WIDE * 2
# shared memory of a multiprocessor, less what the barriers and the compiler need
_SHARED_BYTES = 227 * 1024 - 4096
_MAX_STAGES = 20
# warps that multiply, and warps that copy
_WARPS = 8
_COPIERS = 4
# how much they have on its way at a time: what is more stands before the loads that all programs wait for
_BYTES_AHEAD = 44 * 1024


def step(
    weights: Weights,
    tokens: Tensor,
    embeddings: Tensor,
    gain: Tensor,
    slots: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    counter: Tensor,
    eps: float,
    inner_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """tokens, slots [B] -> the last residuals times their norm's weight [B, H], and their squares in [shares, B].

    embeddings [V, H]; gain [H] of the first norm; conv_state [layers, S, D, K-1], ssm_state [layers, S, D, N];
    counter int32, whose first element is zero before and after. B is at most MAX_ROWS.
    """
    layer, device = weights.layers[0], embeddings.device
    rows = len(tokens)
    width, (dim, taps), rank, states = (
        layer.in_proj.shape[1],
        layer.taps.shape,
        layer.dt_proj.shape[1],
        layer.decay.shape[1],
    )
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    constants = launch_constants(rows, width, rank, states, taps, programs)
    low_width, space = rank + 2 * states, constants["BLOCK_B"]

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    gained, squares = room(rows, width, dtype=torch.bfloat16), room(programs, space)
    persistent_rows_kernel[(programs,)](
        weights.table,
        tokens,
        embeddings,
        gain,
        slots,
        conv_state,
        ssm_state,
        room(programs, low_width, space),
        room(space, low_width),
        room(rows, dim, dtype=torch.bfloat16),
        gained,
        squares,
        counter,
        rows,
        len(weights.layers),
        conv_state.stride(0),
        conv_state.stride(1),
        ssm_state.stride(0),
        ssm_state.stride(1),
        eps,
        inner_eps or 0.0,
        SKIP_DTYPE=_SKIP_DTYPES[layer.skip.dtype],
        HAS_BIAS=layer.in_bias is not None,
        HAS_CONV_BIAS=layer.conv_bias is not None,
        NORM=inner_eps is not None,
        **constants,
        num_warps=constants["WARPS"],
        # all programs at once or none: they wait for each other
        launch_cooperative_grid=True,
    )
    return gained, squares if rows == space else squares[:, :rows].contiguous()


def launch_constants(rows: int, width: int, rank: int, states: int, taps: int, programs: int) -> dict[str, int]:
    """What the kernel is compiled for besides the kind of model: its sizes, and how they are shared out."""
    dim, low_width, space = 2 * width, rank + 2 * states, 8 if rows <= 8 else 16
    channels = 8 * triton.cdiv(dim // 8, programs)
    outputs = triton.cdiv(width, programs)
    c_tiles, o_tiles = triton.cdiv(channels, _HIGH), triton.cdiv(outputs, _HIGH)
    block_c = _HIGH * max(2, triton.next_power_of_2(c_tiles))
    o_space = triton.next_power_of_2(o_tiles)
    columns = _HIGH * _WIDE // block_c
    sums = max(block_c // _HIGH, o_space) * _WARPS * _HIGH * space * 4
    kept = space * block_c * 10 + triton.cdiv(rank, columns) * columns * space * 2
    return {
        "H": width,
        "D": dim,
        "R": rank,
        "N": states,
        "K": taps,
        "BLOCK_B": space,
        "BLOCK_N": triton.next_power_of_2(states),
        "BLOCK_C": block_c,
        "BLOCK_L": 4 * triton.next_power_of_2(triton.cdiv(low_width * space // 4, programs)),
        "C_TILES": c_tiles,
        "Z_TILES": max(1, c_tiles // 2),
        "O_TILES": o_tiles,
        "O_ROWS": triton.cdiv(outputs, o_tiles),
        "O_SPACE": o_space,
        "PROGRAMS": programs,
        "STAGES": min((_SHARED_BYTES - sums - kept) // _STAGE_BYTES, _MAX_STAGES),
        "WARPS": _WARPS,
        "COPIERS": _COPIERS,
        "AHEAD": _stages_ahead(triton.cdiv(channels, c_tiles)),
        "OUT_AHEAD": _stages_ahead(triton.cdiv(outputs, o_tiles)),
        "S_WARPS": 4,
        "DEPTH": 5,
        "GROUP": 2,
    }


def _stages_ahead(rows: int) -> int:
    """How many stages of so many rows may be on their way before the one last begun."""
    return max(1, _BYTES_AHEAD // (rows * _WIDE * 2) - 1)
