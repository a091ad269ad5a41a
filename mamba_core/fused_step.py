"""Decode on a GPU: one token per row through all layers in a handful of fused launches per layer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mamba_core import few_rows_step, single_step
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaBlock, MambaModel
from mamba_core.ops.triton import step as ops
from mamba_core.ops.triton.quantized import Matrix
from mamba_core.ops.triton.step_lag import turn

# the width of the tiles in which the convolution follows its product
_CHANNEL_MULTIPLE = 64


def is_applicable(model: MambaModel) -> bool:
    """Whether ``fused_step`` computes what the layers of this model do, as its weights are now.

    bfloat16 on a GPU, matrices in int8 or not, outside of training; fp16 could not hold the residual times the norm's
    weight.
    """
    weight = model.embeddings.weight
    return (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and not model.training
        and not torch.is_grad_enabled()
        and model.config.intermediate_size % _CHANNEL_MULTIPLE == 0
    )


def fused_step(
    model: MambaModel, tokens: Tensor, slots: Tensor, cache: MambaCache, counters: Tensor, *, may_lag: bool = False
) -> Tensor:
    """tokens, slots [B] int64 -> hidden [B, H] after the final norm; the slots of the cache move on by one token.

    counters: [MAX_TILES] int32 zeros, which are zero again afterwards; no two steps may use them at once. may_lag: see
    ``Packing``.
    """
    step = ops.Step(slots, counters, model.norm_f.eps)
    is_many = step.is_many(model.config.intermediate_size)
    if not is_many and (hidden := _single_launch(model, tokens, slots, cache, counters)) is not None:
        return hidden
    lag = cache.lag if may_lag and is_many else None
    layers = cast(list[MambaBlock], model.layers)
    # made, where they have to be made, before the first kernel: the others read them while their predecessor still runs
    decays = [layer.mixer.A() for layer in layers]
    residual, gained = ops.embed(step, tokens, model.embeddings.weight, layers[0].norm.weight)
    for index, layer in enumerate(layers):
        mixer = layer.mixer
        conv_state, ssm_state = cache.layer(index)
        taps = mixer.conv1d.weight.squeeze(1)
        in_proj, x_proj, out_proj = (Matrix.of(part) for part in (mixer.in_proj, mixer.x_proj, mixer.out_proj))
        xz = ops.project_in(step, gained, in_proj, mixer.in_proj.bias, taps, mixer.conv1d.bias, conv_state)
        low = ops.project_low(step, xz, x_proj)
        y = ops.advance(
            step,
            xz,
            low,
            mixer.dt_proj.weight,
            mixer.dt_proj.bias,
            decays[index],
            mixer.D,
            ssm_state,
            mixer.inner_norm_eps,
            None if lag is None else lag.layer(index),
        )
        norm = layers[index + 1].norm if index + 1 < len(layers) else model.norm_f
        gained, residual = ops.project_out(step, y, out_proj, mixer.out_proj.bias, norm.weight, residual)
    if lag is not None:
        turn(slots, lag)
    return ops.finish(step, gained)


def _single_launch(
    model: MambaModel, tokens: Tensor, slots: Tensor, cache: MambaCache, counters: Tensor
) -> Tensor | None:
    """``fused_step`` of not many rows by one launch for all layers, where there is one that is faster."""
    if len(tokens) == 1 and single_step.is_applicable(model):
        return single_step.single_step(model, tokens, slots, cache, counters)
    if few_rows_step.is_applicable(model, len(tokens)):
        return few_rows_step.few_rows_step(model, tokens, slots, cache, counters)
    return None
