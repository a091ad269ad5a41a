"""Decode of one sequence on a GPU: one token through all layers in a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaBlock, MambaModel
from mamba_core.ops.triton import persistent_rows, persistent_step
from mamba_core.ops.triton.persistent_step import LayerWeights, Weights
from mamba_core.ops.triton.step import Gained, Step, finish

# layers narrower than this take less time than their programs' waiting for each other
_LEAST_WIDTH = 1024
# the same for several rows: less wide ones were not timed
_LEAST_WIDTH_OF_SEVERAL = 768


def is_applicable(model: MambaModel) -> bool:
    """Whether ``single_step`` can take the place of ``fused_step`` for one row, and is faster."""
    return model.config.hidden_size >= _LEAST_WIDTH and suits(model, persistent_step.is_applicable)


def suits(model: MambaModel, can_run: Callable[[LayerWeights], bool]) -> bool:
    """Whether a launch for all layers can run, which ``can_run`` for layers of such weights."""
    layers = cast(list[MambaBlock], model.layers)
    # else its decays would be made anew, at another address, for every step
    return not layers[0].mixer.A_log.is_inference() and can_run(_weights_of_layer(model, 0))


def suits_several(model: MambaModel) -> bool:
    """The same for those that take several rows, where layers are wide enough for it to be faster."""
    return model.config.hidden_size >= _LEAST_WIDTH_OF_SEVERAL and suits(model, persistent_rows.is_applicable)


def single_step(model: MambaModel, tokens: Tensor, slots: Tensor, cache: MambaCache, counters: Tensor) -> Tensor:
    """``fused_step`` for tokens, slots [1]."""
    return run(persistent_step.step, model, tokens, slots, cache, counters)


def run(
    launch: Callable[..., tuple[Tensor, Tensor]],
    model: MambaModel,
    tokens: Tensor,
    slots: Tensor,
    cache: MambaCache,
    counters: Tensor,
) -> Tensor:
    """``fused_step`` by one launch for all layers, which takes what ``persistent_step.step`` does."""
    layers = cast(list[MambaBlock], model.layers)
    gained, squares = launch(
        located(model),
        tokens,
        model.embeddings.weight,
        layers[0].norm.weight,
        slots,
        cache.conv,
        cache.ssm,
        counters,
        model.norm_f.eps,
        layers[0].mixer.inner_norm_eps,
    )
    return finish(Step(slots, counters, model.norm_f.eps), Gained(gained, squares, squares.shape[0]))


def located(model: MambaModel) -> Weights:
    """Where the model's weights are now."""
    weights = [_weights_of_layer(model, index) for index in range(len(model.layers))]
    model.located_weights = persistent_step.locate(weights, model.located_weights)
    return model.located_weights


def _weights_of_layer(model: MambaModel, index: int) -> LayerWeights:
    layers = cast(list[MambaBlock], model.layers)
    mixer = layers[index].mixer
    norm = layers[index + 1].norm if index + 1 < len(layers) else model.norm_f
    return LayerWeights(
        in_proj=mixer.in_proj.weight,
        x_proj=mixer.x_proj.weight,
        out_proj=mixer.out_proj.weight,
        taps=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        dt_proj=mixer.dt_proj.weight,
        dt_bias=mixer.dt_proj.bias,
        decay=mixer.A(),
        skip=mixer.D,
        gain=norm.weight,
        in_bias=mixer.in_proj.bias,
        out_bias=mixer.out_proj.bias,
        in_scales=getattr(mixer.in_proj, "scales", None),
        x_scales=getattr(mixer.x_proj, "scales", None),
        out_scales=getattr(mixer.out_proj, "scales", None),
    )
