"""The compiled decode step of a CPU against the layers one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from mamba_core import MambaCache, MambaForCausalLM
from mamba_core.cpu_step import CpuStep
from mamba_core.ops import Packing
from mamba_core.quantization import quantize_int8

MakeModel = Callable[..., MambaForCausalLM]

ODD = {"hidden_size": 45, "state_size": 5, "time_step_rank": 7, "conv_kernel": 3, "use_bias": True}
SHAPES = [
    ("mamba", {}),
    ("mamba", {"use_bias": True, "use_conv_bias": False, "state_size": 16}),
    ("mamba", ODD),
    ("mamba", {"hidden_size": 72, "state_size": 16, "time_step_rank": 48}),
    ("falcon_mamba", {"state_size": 16, "time_step_rank": 20}),
    ("falcon_mamba", {"hidden_size": 40, "state_size": 21, "time_step_rank": 3, "use_bias": True}),
]


def in_dtype(model: MambaForCausalLM, dtype: torch.dtype) -> MambaForCausalLM:
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "mixer.D")):
            parameter.data = parameter.data.float()
    return model


def warm_cache(model: MambaForCausalLM, num_slots: int, dtype: torch.dtype) -> MambaCache:
    """A cache whose slots look as if sequences had passed through them."""
    generator = torch.Generator().manual_seed(3)
    cache = MambaCache.from_config(model.config, num_slots, dtype=dtype)
    for state in (cache.conv, cache.ssm):
        state.copy_(torch.randn(state.shape, generator=generator))
    return cache


def clone(cache: MambaCache, dtype: torch.dtype) -> MambaCache:
    return MambaCache(cache.conv.to(dtype, copy=True), cache.ssm.clone())


def error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def layer_by_layer(model: MambaForCausalLM, tokens: Tensor, slots: Tensor, cache: MambaCache) -> Tensor:
    backbone = model.backbone
    return backbone.forward_packed(backbone.embeddings(tokens), Packing.step(slots), cache)


@torch.inference_mode()
def check_step(
    make_model: MakeModel, family: str, changes: dict[str, object], dtype: torch.dtype, step: CpuStep
) -> None:
    """Hidden states and states of a few numbers of rows; all other slots as they were, bit by bit."""
    with torch.inference_mode(False):
        model = in_dtype(make_model(family, **changes), dtype)
        reference = make_model(family, **changes)
        reference.load_state_dict(model.state_dict())
    for num_rows in (1, 2, 3, 7, 17, 64):
        slots = 1 + torch.randperm(num_rows + 3, generator=torch.Generator().manual_seed(1))[:num_rows]
        tokens = (torch.arange(num_rows) * 7) % model.config.vocab_size
        cache = warm_cache(model, num_rows + 4, dtype)
        before, plain, exact = clone(cache, dtype), clone(cache, dtype), clone(cache, torch.float32)
        expected = layer_by_layer(reference, tokens, slots, exact)
        one_by_one = layer_by_layer(model, tokens, slots, plain)
        hidden = step.step(model.backbone, tokens, slots, cache)
        assert hidden.dtype == dtype
        # no worse than the layers in the same type, which are exact here in fp32
        slack = 2e-6 if dtype == torch.float32 else 1e-3
        assert error(hidden, expected) < 1.2 * error(one_by_one, expected) + slack
        for ours, theirs, right in ((cache.ssm, plain.ssm, exact.ssm), (cache.conv, plain.conv, exact.conv)):
            assert error(ours[:, slots], right[:, slots]) < 1.2 * error(theirs[:, slots], right[:, slots]) + slack
        others = torch.ones(num_rows + 4, dtype=torch.bool)
        others[slots] = False
        assert torch.equal(cache.ssm[:, others], before.ssm[:, others])
        assert torch.equal(cache.conv[:, others], before.conv[:, others])


def widened(model: MambaForCausalLM, reference: MambaForCausalLM) -> MambaForCausalLM:
    """``reference`` with the weights that a quantized model stands for, in fp32."""
    values = model.state_dict()
    for name in [name for name in values if name.endswith("scales")]:
        weight = name.replace("scales", "weight")
        values[weight] = values[weight].float() * values.pop(name)[:, None]
    # of quantized models, the head is not the embeddings any more
    reference.lm_head.weight = torch.nn.Parameter(values["lm_head.weight"])
    reference.load_state_dict(values)
    return reference


@torch.no_grad()
def check_int8_step(
    make_model: MakeModel, family: str, changes: dict[str, object], dtype: torch.dtype, step: CpuStep, rounds: bool
) -> None:
    """A quantized model's step and logits, next to those of its weights in fp32; rounds: inputs to 16 bits."""
    model = in_dtype(make_model(family, **changes), dtype)
    original = copy.deepcopy(model)
    quantize_int8(model)
    reference = widened(model, make_model(family, **changes))
    assert 1e-4 < error(reference.lm_head.weight, original.lm_head.weight) < 1e-2
    for num_rows in (1, 3, 17):
        slots, tokens = 1 + torch.arange(num_rows), (torch.arange(num_rows) * 7) % 97
        cache = warm_cache(model, num_rows + 2, dtype)
        plain, exact = clone(cache, dtype), clone(cache, torch.float32)
        expected = layer_by_layer(reference, tokens, slots, exact)
        one_by_one = layer_by_layer(model, tokens, slots, plain)
        hidden = step.step(model.backbone, tokens, slots, cache)
        slack = 2e-6 if dtype == torch.float32 and not rounds else 1e-3
        assert error(one_by_one, expected) < (2e-6 if dtype == torch.float32 else 3e-2)
        assert error(hidden, expected) < 1.2 * error(one_by_one, expected) + slack
        assert error(cache.ssm, exact.ssm) < 1.2 * error(plain.ssm, exact.ssm) + slack
        logits = step.project(hidden, model.lm_head.weight, model.lm_head.scales)
        assert error(logits, hidden.float() @ reference.lm_head.weight.T) < (1e-3 if rounds else 1e-6)
