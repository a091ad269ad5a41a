"""One token of one sequence through all layers in a single launch, where weights are large enough for it to pay.

The launch takes the weights of all layers by their addresses, which are kept in a table on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.layout import is_tap_major
from mamba_core.ops.triton.persistent_step_kernel import persistent_step_kernel
from mamba_core.ops.triton.persistent_step_tiles import Sizes

# columns of which a stage holds whole tiles; the least a product must be wide
_TILE = 512
# shared memory of a multiprocessor that the ring may take
_RING_BYTES = 200 * 1024
_MAX_STAGES = 20
# warps that multiply, and how many bytes of a tile are those of each
WARPS = 8
_WARP_BYTES = 512
# warps that copy, and how much they have on its way at a time: what is more than keeps memory busy stands before the
# loads that all programs wait for (2.8b on an H200: 1.41 ms with 40 KiB, 1.50 with 60, 1.62 with 140)
_COPIERS = 4
_BYTES_AHEAD = 40 * 1024
# beyond these what a program holds does not fit its registers
_MAX_WIDTH = 4096
_MAX_CHANNELS = 64
# of each of which a thread of a warp holds eight squares
_MAX_PROGRAMS = 256
_WEIGHT_DTYPES = {torch.bfloat16: gl.bfloat16, torch.int8: gl.int8}
_SKIP_DTYPES = {torch.float32: gl.float32, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of a layer, in the order of the kernel's table; ``gain`` is that of the norm that follows it.

    in_proj [2 D, H], x_proj [R + 2 N, D], out_proj [H, D], taps [D, K], dt_proj [D, R], decay [D, N] fp32; all else
    bfloat16 but for skip [D], which may be fp32, and for the first three, which may be int8 with scales, one fp32 per
    output.
    """

    in_proj: Tensor
    x_proj: Tensor
    out_proj: Tensor
    taps: Tensor
    conv_bias: Tensor | None
    dt_proj: Tensor
    dt_bias: Tensor
    decay: Tensor
    skip: Tensor
    gain: Tensor
    in_bias: Tensor | None
    out_bias: Tensor | None
    in_scales: Tensor | None = None
    x_scales: Tensor | None = None
    out_scales: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def sizes(self) -> tuple[int, int, int, int]:
        """H, R, N and K."""
        return self.in_proj.shape[1], self.dt_proj.shape[1], self.decay.shape[1], self.taps.shape[1]


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of all layers and where they lie: table [layers, 15] int64 addresses on their device."""

    layers: tuple[LayerWeights, ...]
    addresses: tuple[int, ...]
    table: Tensor


def is_applicable(layer: LayerWeights) -> bool:
    """Whether the kernel can run, for layers of such weights."""
    return can_run(layer, _TILE)


def can_run(layer: LayerWeights, tile: int) -> bool:
    """The same for a kernel whose stages are ``tile`` columns wide."""
    (width, rank, states, taps), dim = layer.sizes(), layer.taps.shape[0]
    device = layer.in_proj.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return (
        layer.in_proj.dtype in _WEIGHT_DTYPES
        and layer.gain.dtype == torch.bfloat16
        and layer.skip.dtype in _SKIP_DTYPES
        and dim == 2 * width
        and width % tile == 0
        and width <= _MAX_WIDTH
        and rank % 8 == 0
        and states % 4 == 0
        and taps > 1
        and triton.cdiv(dim, programs) <= _MAX_CHANNELS
        and programs <= _MAX_PROGRAMS
    )


def locate(layers: Sequence[LayerWeights], known: Weights | None) -> Weights:
    """Where these weights lie; ``known`` itself as long as it is still true."""
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for layer in layers for tensor in layer.tensors())
    if known is not None and known.addresses == addresses:
        return known
    table = torch.tensor(addresses, dtype=torch.int64).view(len(layers), -1)
    return Weights(tuple(layers), addresses, table.to(layers[0].in_proj.device))


def step(
    weights: Weights,
    token: Tensor,
    embeddings: Tensor,
    gain: Tensor,
    slot: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    counter: Tensor,
    eps: float,
    inner_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """token, slot [1] -> the last residual times its norm's weight [1, H], and its squares in shares [shares, 1].

    embeddings [V, H]; gain [H] of the first norm; conv_state [layers, S, D, K-1], ssm_state [layers, S, D, N];
    counter int32, whose first element is zero before and after.
    """
    layer, device = weights.layers[0], embeddings.device
    width, rank, states, taps = layer.sizes()
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    sizes = sizes_for(width, rank, states, taps, programs, layer.in_proj.itemsize)

    room = partial(torch.empty, dtype=torch.float32, device=device)
    gained, squares = room(width, dtype=torch.bfloat16), room(programs)
    x, y = room(2 * width, dtype=torch.bfloat16), room(2 * width, dtype=torch.bfloat16)
    launch(
        persistent_step_kernel,
        (programs,),
        weights,
        (token, embeddings, gain, slot, conv_state, ssm_state),
        (x, room(rank + 2 * states), y, gained, squares, counter),
        (eps, inner_eps or 0.0),
        sizes._replace(
            WEIGHT_DTYPE=_WEIGHT_DTYPES[layer.in_proj.dtype],
            HAS_BIAS=layer.in_bias is not None,
            NORM=inner_eps is not None,
            **kind(layer, conv_state),
        ),
    )
    return gained[None], squares[:, None]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    weights: Weights,
    inputs: tuple[Tensor, ...],
    rooms: tuple[Any, ...],
    epsilons: tuple[float, ...],
    sizes: Any,
) -> None:
    """Launch a kernel for all layers; all its programs run at once or none, since they wait for each other.

    inputs: what all take, the states of convolution and recurrence last. rooms: what programs tell each other and what
    comes of it, their counters, and how many rows there are where that may differ.
    """
    conv_state, ssm_state = inputs[-2:]
    strides = *conv_state.stride()[:2], *ssm_state.stride()[:2]
    kernel[grid](
        weights.table,
        *inputs,
        *rooms,
        len(weights.layers),
        *strides,
        *epsilons,
        SIZES=sizes,
        num_warps=WARPS,
        launch_cooperative_grid=True,
    )


def kind(layer: LayerWeights, conv_state: Tensor) -> dict[str, Any]:
    """What every kernel for all layers is compiled for besides sizes: the kind of model, and of its state."""
    return {
        "SKIP_DTYPE": _SKIP_DTYPES[layer.skip.dtype],
        "HAS_CONV_BIAS": layer.conv_bias is not None,
        "TAP_MAJOR": is_tap_major(conv_state),
    }


def sizes_for(width: int, rank: int, states: int, taps: int, programs: int, weight_bytes: int = 2) -> Sizes:
    """The sizes of the layers, and how they are shared out, for any kind of model."""
    parts = _WARP_BYTES // (256 * weight_bytes) * WARPS
    stage_bytes = WARPS * _WARP_BYTES * (width // _TILE)
    rows, wide_rows = parts // 2, parts // 4
    high = 1 << (rank.bit_length() - 1)

    def stages(size: int, rows: int) -> int:
        """Those of the program with most of ``size`` rows."""
        return triton.cdiv(triton.cdiv(size, programs), rows)

    x_stages, p_stages = stages(2 * width, rows), stages(rank + 2 * states, wide_rows)
    o_stages = stages(width, wide_rows)
    return Sizes(
        H=width,
        D=2 * width,
        R=rank,
        N=states,
        K=taps,
        R_HIGH=high,
        R_LOW=triton.next_power_of_2(rank - high) if rank > high else 0,
        BLOCK_N=triton.next_power_of_2(states),
        BLOCK_C=triton.next_power_of_2(x_stages * rows),
        BLOCK_O=triton.next_power_of_2(o_stages * wide_rows),
        BLOCK_P=triton.next_power_of_2(p_stages * wide_rows),
        X_STAGES=x_stages,
        Z_STAGES=x_stages // 2,
        P_STAGES=p_stages,
        O_STAGES=o_stages,
        PROGRAMS=programs,
        PARTS=parts,
        STAGES=min(_RING_BYTES // stage_bytes, _MAX_STAGES),
        WARPS=WARPS,
        COPIERS=_COPIERS,
        AHEAD=max(1, triton.cdiv(_BYTES_AHEAD, stage_bytes) - 1),
    )
