"""Labels become a loss, the loss becomes the right gradients, and a fresh model starts as the paper's does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaCache,
    MambaConfig,
    MambaForCausalLM,
    loss,
    ops,
)
from mamba_core.ops import reference

Make = Callable[..., MambaForCausalLM]
Theirs = Callable[[MambaForCausalLM], torch.nn.Module]
Tokens = Callable[..., Tensor]
Gradients = dict[str, Tensor]


def set_checkpointing(model: MambaForCausalLM, enabled: bool, use_reentrant: bool = False) -> None:
    # transformers renamed both calls on the way
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enabled:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": use_reentrant})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def gradients(model: torch.nn.Module, input_ids: Tensor, **arguments: Any) -> tuple[float, Gradients]:
    model.train()
    model.zero_grad()
    value = model(input_ids, labels=input_ids, **arguments).loss
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(ours: tuple[float, Gradients], theirs: tuple[float, Gradients], tolerance: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        scale = float(expected.abs().max())
        assert scale > 0, f"{name} has no gradient to compare"
        assert float((ours[1][name] - expected).abs().max()) <= tolerance * max(scale, 1e-3), name


def test_gradients_equal_those_of_the_reference_ops(
    family: str, tiny_model: Make, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, input_ids = tiny_model(family, use_bias=True), tokens(3, 21)
    mask = torch.ones(3, 21, dtype=torch.int64)
    mask[1, :6], mask[2, 20] = 0, 0
    ours = gradients(model, input_ids, attention_mask=mask)
    for name in ops.__all__:
        if name != "Packing":
            monkeypatch.setattr(ops, name, getattr(reference, name))
    assert_equal(ours, gradients(model, input_ids, attention_mask=mask), 1e-4)


def test_loss_and_gradients_equal_transformers(
    family: str, tiny_model: Make, their_model: Theirs, tokens: Tokens
) -> None:
    model, input_ids = tiny_model(family), tokens(2, 18)
    ours, theirs = gradients(model, input_ids), gradients(their_model(model), input_ids)
    assert_equal(ours, theirs, 1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    family: str, use_reentrant: bool, tiny_model: Make, tokens: Tokens
) -> None:
    model, input_ids = tiny_model(family), tokens(2, 15)
    plain = gradients(model, input_ids)
    set_checkpointing(model, True, use_reentrant)
    assert_equal(gradients(model, input_ids), plain, 1e-5)
    assert model.train()(input_ids, use_cache=True).past_key_values is None
    set_checkpointing(model, False)
    assert_equal(gradients(model, input_ids), plain, 1e-6)


def test_gradient_checkpointing_recomputes_every_layer(tiny_model: Make, tokens: Tokens) -> None:
    model, calls = tiny_model(), []
    for layer in model.backbone.layers:
        layer.mixer.in_proj.register_forward_hook(lambda *_: calls.append(1))
    set_checkpointing(model, True)
    gradients(model, tokens(1, 5))
    assert len(calls) == 2 * len(model.backbone.layers)


def test_a_carried_state_is_not_advanced_twice(tiny_model: Make, tokens: Tokens) -> None:
    model = tiny_model().train()
    cache = MambaCache.from_config(model.config, 1, dtype=model.dtype)
    first, second = tokens(1, 12).split(6, dim=1)
    model(first, past_key_values=cache)
    before = cache.export(0)
    set_checkpointing(model, True)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(second, past_key_values=cache, labels=second)
    assert torch.equal(cache.export(0).ssm, before.ssm)
    set_checkpointing(model, False)
    model(second, past_key_values=cache, labels=second).loss.backward()
    with torch.no_grad():
        whole = model.eval()(tokens(1, 12)).past_key_values
    assert torch.allclose(cache.ssm, whole.ssm, atol=1e-5)


def test_ignored_labels_and_padding_count_for_nothing(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 10)
    labels = input_ids.clone()
    labels[0, 3:6] = -100
    logits = model(input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert model(input_ids, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-6)

    alone = model(input_ids[:1, 4:], labels=input_ids[:1, 4:]).loss
    mask = torch.tensor([[0] * 4 + [1] * 6])
    padded = model(input_ids[:1], attention_mask=mask, labels=input_ids[:1]).loss
    assert padded.item() == pytest.approx(alone.item(), abs=1e-6)


def test_loss_over_the_items_of_a_larger_batch(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 10)
    mean = model(input_ids, labels=input_ids).loss
    over_more = model(input_ids, labels=input_ids, num_items_in_batch=torch.tensor(90)).loss
    assert over_more.item() == pytest.approx(mean.item() * 18 / 90, rel=1e-6)


@pytest.mark.parametrize("at_once", [97, 97 * 7, 10**9])
def test_the_fused_loss_equals_the_plain_one(
    at_once: int, tiny_model: Make, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", at_once)
    model, input_ids = tiny_model(), tokens(2, 11)
    plain = gradients(model, input_ids)
    model.config.fuse_linear_cross_entropy = True
    assert_equal(gradients(model, input_ids), plain, 1e-5)
    assert model(input_ids, labels=input_ids).logits is None
    assert model(input_ids).logits.shape == (2, 11, 97)


def test_the_fused_loss_never_makes_all_logits(
    tiny_model: Make, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", 97 * 4)
    model, sizes = tiny_model(fuse_linear_cross_entropy=True), []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[0]))
    gradients(model, tokens(2, 10))
    assert max(sizes) == 4
    assert sum(sizes) == 2 * 20


def test_training_in_mixed_precision(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model(), tokens(2, 16)
    exact = gradients(model, input_ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model, input_ids)
    assert mixed[0] == pytest.approx(exact[0], rel=0.02)
    for name, expected in exact[1].items():
        cosine = F.cosine_similarity(mixed[1][name].flatten(), expected.flatten(), dim=0)
        assert cosine > 0.98, name


def test_a_tiny_model_learns_by_heart(family: str, tokens: Tokens) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.02}
    model = (
        MambaForCausalLM(MambaConfig(**sizes))
        if family == "mamba"
        else FalconMambaForCausalLM(FalconMambaConfig(**sizes))
    ).train()
    input_ids = tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        value = model(input_ids, labels=input_ids).loss
        value.backward()
        optimizer.step()
        first = first if first is not None else value.item()
    assert first == pytest.approx(math.log(97), rel=0.1)
    assert value.item() < 0.2


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=4, initializer_range=0.02, time_step_floor=0.002,
        time_step_min=0.001, time_step_max=0.1, rescale_prenorm_residual=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = MambaForCausalLM(config)
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert torch.equal(mixer.A_log, torch.arange(1.0, 17).log().expand(128, 16))
        assert torch.equal(mixer.D, torch.ones(128))
        dt = F.softplus(mixer.dt_proj.bias)
        assert dt.min().item() >= 0.002 * 0.999
        assert dt.max().item() <= 0.1 * 1.001
        assert (dt > 0.01).float().mean().item() == pytest.approx(0.5, abs=0.2)
        assert mixer.dt_proj.weight.abs().max().item() <= 4**-0.5
        # uniform in +-1/sqrt(fan_in), that of the residual branch smaller by the square root of the depth
        assert mixer.in_proj.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
        assert mixer.out_proj.weight.abs().max().item() == pytest.approx(128**-0.5 / 2, rel=0.01)
        assert mixer.conv1d.weight.abs().max().item() == pytest.approx(0.5, rel=0.02)
        assert torch.equal(layer.norm.weight, torch.ones(64))
        assert mixer.A_log._no_weight_decay
        assert mixer.D._no_weight_decay


def test_constant_dt_weights() -> None:
    model = MambaForCausalLM(
        MambaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, dt_init_scheme="constant", dt_scale=3.0)
    )
    weight = model.backbone.layers[0].mixer.dt_proj.weight
    assert torch.equal(weight, torch.full_like(weight, 3.0 * 2**-0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_gradients_on_a_gpu_equal_those_on_a_cpu(
    family: str, use_checkpointing: bool, tiny_model: Make, tokens: Tokens
) -> None:
    model, input_ids = tiny_model(family), tokens(3, 65)
    mask = torch.ones(3, 65, dtype=torch.int64)
    mask[1, :20] = 0
    expected = gradients(model, input_ids, attention_mask=mask)
    model.cuda()
    set_checkpointing(model, use_checkpointing)
    value, found = gradients(model, input_ids.cuda(), attention_mask=mask.cuda())
    assert_equal((value, {name: gradient.cpu() for name, gradient in found.items()}), expected, 1e-3)


@pytest.mark.gpu
def test_training_in_mixed_precision_on_a_gpu(tiny_model: Make, tokens: Tokens) -> None:
    model, input_ids = tiny_model().cuda(), tokens(4, 64).cuda()
    exact = gradients(model, input_ids)
    with torch.autocast("cuda", torch.bfloat16):
        mixed = gradients(model, input_ids)
    assert mixed[0] == pytest.approx(exact[0], rel=0.02)
    for name, expected in exact[1].items():
        cosine = F.cosine_similarity(mixed[1][name].flatten(), expected.flatten(), dim=0)
        assert cosine > 0.98, name
