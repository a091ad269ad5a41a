"""Decode of 17 to 64 sequences on a GPU: one token each through all layers in a single launch."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from mamba_core import single_step
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaBlock, MambaModel
from mamba_core.ops.triton import persistent_narrow, persistent_wide
from mamba_core.ops.triton.persistent_many import MAX_ROWS

# fewer are faster in other ways, for layers of at least _WIDE and for narrower ones
LEAST_ROWS = 17
_LEAST_ROWS_NARROW = 33
_WIDE = 1024


def is_applicable(model: MambaModel, num_rows: int) -> bool:
    """Whether ``wide_step`` can take the place of ``fused_step`` for so many rows, and is faster."""
    width = model.config.hidden_size
    return (
        least_rows(width) <= num_rows <= MAX_ROWS
        and single_step.suits_several(model)
        and _can_run(cast(list[MambaBlock], model.layers)[0])
    )


def least_rows(width: int) -> int:
    """The rows from which it is faster, for layers so wide."""
    return LEAST_ROWS if width >= _WIDE else _LEAST_ROWS_NARROW


def _can_run(layer: MambaBlock) -> bool:
    mixer = layer.mixer
    weight = mixer.in_proj.weight
    kernel = _kernel_for(layer)
    return (
        kernel is not None
        and weight.dtype == torch.bfloat16
        and mixer.in_proj.bias is None
        and mixer.out_proj.bias is None
        and mixer.inner_norm_eps is None
        and torch.cuda.get_device_properties(weight.device).multi_processor_count >= kernel.programs(weight.shape[1])
    )


def _kernel_for(layer: MambaBlock) -> ModuleType | None:
    """The module of a kernel for layers of such sizes: the faster one first."""
    mixer = layer.mixer
    sizes = mixer.in_proj.weight.shape[1], mixer.dt_proj.weight.shape[1], mixer.A_log.shape[1]
    return next((kernel for kernel in (persistent_narrow, persistent_wide) if kernel.fits(*sizes)), None)


def wide_step(model: MambaModel, tokens: Tensor, slots: Tensor, cache: MambaCache, counters: Tensor) -> Tensor:
    """``fused_step`` for tokens, slots [B], B at most MAX_ROWS."""
    kernel = _kernel_for(cast(list[MambaBlock], model.layers)[0])
    assert kernel is not None
    return single_step.run(kernel.step, model, tokens, slots, cache, counters)
