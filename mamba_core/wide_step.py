"""Decode of 17 to 64 sequences on a GPU: one token each through all layers in a single launch."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mamba_core import single_step
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaBlock, MambaModel
from mamba_core.ops.triton import persistent_wide

# fewer are faster in other ways
LEAST_ROWS = 17


def is_applicable(model: MambaModel, num_rows: int) -> bool:
    """Whether ``wide_step`` can take the place of ``fused_step`` for so many rows, and is faster."""
    return (
        LEAST_ROWS <= num_rows <= persistent_wide.MAX_ROWS
        and single_step.is_applicable(model)
        and _fits(cast(list[MambaBlock], model.layers)[0])
    )


def _fits(layer: MambaBlock) -> bool:
    mixer = layer.mixer
    weight = mixer.in_proj.weight
    return (
        weight.dtype == torch.bfloat16
        and mixer.in_proj.bias is None
        and mixer.out_proj.bias is None
        and mixer.inner_norm_eps is None
        and persistent_wide.fits(weight.shape[1], mixer.dt_proj.weight.shape[1], mixer.A_log.shape[1])
        and torch.cuda.get_device_properties(weight.device).multi_processor_count >= persistent_wide.PROGRAMS
    )


def wide_step(model: MambaModel, tokens: Tensor, slots: Tensor, cache: MambaCache, counters: Tensor) -> Tensor:
    """``fused_step`` for tokens, slots [B], B at most MAX_ROWS."""
    return single_step.run(persistent_wide.step, model, tokens, slots, cache, counters)
