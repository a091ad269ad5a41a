"""One token each of several sequences through all layers in a single launch: 2 to 16, of a narrow model up to 64."""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from mamba_core.ops.triton.persistent_rows_kernel import persistent_rows_kernel
from mamba_core.ops.triton.persistent_rows_tiles import Sizes
from mamba_core.ops.triton.persistent_step import WARPS, LayerWeights, Weights, can_run, kind, launch

# rows that a program can take, and those that groups of programs can, eight each
_PROGRAM_ROWS = 16
MAX_ROWS = 32
# models less wide than the first leave programs without work, so that their rows are shared out; groups of programs,
# which stream all weights each, are faster than launches below the second (on an H200, both)
_SHARED_OUT = 1536
_NARROW = 1024
# rows of a stage; its columns, and those of models whose width is not a multiple
_HIGH = 16
_WIDE = 512
_LESS_WIDE = 256
# shared memory of a multiprocessor, less what the barriers and the compiler need
_SHARED_BYTES = 227 * 1024 - 4096
_MAX_STAGES = 26
# warps that copy
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
    counter int32, 32 elements for each group of rows, zero before and after. B is at most ``max_rows``.
    """
    layer, device = weights.layers[0], embeddings.device
    rows = len(tokens)
    width, rank, states, taps = layer.sizes()
    available = torch.cuda.get_device_properties(device).multi_processor_count
    sizes = sizes_for(rows, width, rank, states, taps, available)
    programs, groups, space, low_width = sizes.PROGRAMS, sizes.GROUPS, sizes.BLOCK_B, rank + 2 * states
    places = groups * space

    room = partial(torch.empty, dtype=torch.float32, device=device)
    shares, low = room(groups, programs, low_width, space), room(places, low_width)
    y, gained = room(rows, 2 * width, dtype=torch.bfloat16), room(rows, width, dtype=torch.bfloat16)
    squares = room(programs, places)
    launch(
        persistent_rows_kernel,
        (programs, groups),
        weights,
        (tokens, embeddings, gain, slots, conv_state, ssm_state),
        (shares, low, y, gained, squares, counter, rows),
        (eps, inner_eps or 0.0),
        sizes._replace(**kind(layer, conv_state), HAS_BIAS=layer.in_bias is not None, NORM=inner_eps is not None),
    )
    return gained, squares if rows == places else squares[:, :rows].contiguous()


def max_rows(width: int) -> int:
    """How many rows one launch can take, of a model of this width."""
    return MAX_ROWS if width < _NARROW else _PROGRAM_ROWS


def is_applicable(layer: LayerWeights) -> bool:
    """Whether the kernel can run, for layers of such weights."""
    return layer.in_proj.dtype == torch.bfloat16 and can_run(layer, _LESS_WIDE)


def share_out(rows: int, width: int, available: int) -> tuple[int, int, int]:
    """The rows of a group of programs, at most 16, the number of groups, and the programs of each."""
    if width >= _SHARED_OUT:
        return 8 if rows <= 8 else 16, 1, available
    groups = triton.cdiv(rows, 8)
    # of 16 channels each: more programs would not have less to do
    tiles = triton.cdiv(2 * width, _HIGH)
    return 8, groups, triton.cdiv(tiles, triton.cdiv(tiles, available // groups))


def sizes_for(rows: int, width: int, rank: int, states: int, taps: int, available: int) -> Sizes:
    """The sizes of the layers, and how they are shared out, for any kind of model."""
    space, groups, programs = share_out(rows, width, available)
    dim, low_width = 2 * width, rank + 2 * states
    wide = _WIDE if width % _WIDE == 0 else _LESS_WIDE
    stage_bytes = _HIGH * wide * 2
    channels = 8 * triton.cdiv(dim // 8, programs)
    outputs = triton.cdiv(width, programs)
    c_tiles, o_tiles = triton.cdiv(channels, _HIGH), triton.cdiv(outputs, _HIGH)
    block_c = _HIGH * max(2, triton.next_power_of_2(c_tiles))
    o_space = triton.next_power_of_2(o_tiles)
    columns = _HIGH * wide // block_c
    sums = max(block_c // _HIGH, o_space) * WARPS * _HIGH * space * 4
    kept = space * block_c * 10 + triton.cdiv(rank, columns) * columns * space * 2
    return Sizes(
        WIDE=wide,
        H=width,
        D=dim,
        R=rank,
        N=states,
        K=taps,
        BLOCK_B=space,
        BLOCK_N=triton.next_power_of_2(states),
        BLOCK_C=block_c,
        BLOCK_L=4 * triton.next_power_of_2(triton.cdiv(low_width * space // 4, programs)),
        P_SPACE=triton.next_power_of_2(programs),
        C_TILES=c_tiles,
        Z_TILES=max(1, c_tiles // 2),
        O_TILES=o_tiles,
        O_ROWS=triton.cdiv(outputs, o_tiles),
        O_SPACE=o_space,
        PROGRAMS=programs,
        GROUPS=groups,
        STAGES=min((_SHARED_BYTES - sums - kept) // stage_bytes, _MAX_STAGES),
        WARPS=WARPS,
        COPIERS=_COPIERS,
        AHEAD=_stages_ahead(triton.cdiv(channels, c_tiles), wide),
        OUT_AHEAD=_stages_ahead(triton.cdiv(outputs, o_tiles), wide),
        S_WARPS=2 if wide == _WIDE and space == 8 else 4,
        DEPTH=6 if wide == _LESS_WIDE else 4 if space == 8 else 5,
        GROUP=2 if wide == _WIDE else 3,
        O_GROUP=1 if wide == _WIDE else max(1, 3 // o_tiles),
    )


def _stages_ahead(rows: int, wide: int) -> int:
    """How many stages of so many rows may be on their way before the one last begun."""
    return max(1, _BYTES_AHEAD // (rows * wide * 2) - 1)
