"""Decode of a few sequences on a GPU: one token each through all layers in a single launch."""

from __future__ import annotations

from torch import Tensor

from mamba_core import single_step
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaModel
from mamba_core.ops.triton import persistent_rows


def is_applicable(model: MambaModel, num_rows: int) -> bool:
    """Whether ``few_rows_step`` can take the place of ``fused_step`` for so many rows, and is faster."""
    width = model.config.hidden_size
    return 1 < num_rows <= persistent_rows.max_rows(width) and single_step.suits_several(model)


def few_rows_step(model: MambaModel, tokens: Tensor, slots: Tensor, cache: MambaCache, counters: Tensor) -> Tensor:
    """``fused_step`` for tokens, slots [B], B at most ``max_rows`` of the model's width."""
    return single_step.run(persistent_rows.step, model, tokens, slots, cache, counters)
