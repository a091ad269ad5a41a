"""The Auto classes find our classes for published checkpoints; transformers' own stay where they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import mamba_core
from mamba_core import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    FalconMambaModel,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
)

Make = Callable[..., MambaForCausalLM]
Theirs = Callable[[MambaForCausalLM], torch.nn.Module]
Tokens = Callable[..., Tensor]

OURS = {
    "mamba": (MambaConfig, MambaModel, MambaForCausalLM),
    "falcon_mamba": (FalconMambaConfig, FalconMambaModel, FalconMambaForCausalLM),
}


def test_everything_exported_exists() -> None:
    assert all(hasattr(mamba_core, name) for name in mamba_core.__all__)


def test_auto_classes_load_what_transformers_saved(
    family: str, tiny_model: Make, their_model: Theirs, tokens: Tokens, tmp_path: Path
) -> None:
    model = tiny_model(family)
    theirs = their_model(model)
    assert type(theirs).__module__.startswith("transformers.")
    theirs.save_pretrained(tmp_path)
    config_class, base_class, model_class = OURS[family]
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert (type(loaded), type(base)) == (model_class, base_class)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
        assert torch.equal(base(tokens(1, 9))[0], model.backbone(tokens(1, 9))[0])


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_we_save_loads_here_and_in_transformers(
    family: str, is_tied: bool, tiny_model: Make, their_model: Theirs, tokens: Tokens, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not is_tied
    ours = type(model).from_pretrained(tmp_path)
    theirs = type(their_model(model)).from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(tokens(1, 9)).logits
        assert torch.equal(ours(tokens(1, 9)).logits, logits)
        assert (theirs(tokens(1, 9)).logits - logits).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_A_and_D_in_fp32(dtype: torch.dtype, tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        is_kept = name.endswith(("mixer.A_log", "mixer.D"))
        assert parameter.dtype == (torch.float32 if is_kept else dtype), name
        assert getattr(parameter, "_no_weight_decay", False) is is_kept, name
    mixer = loaded.backbone.layers[0].mixer
    assert torch.equal(mixer.A_log, model.backbone.layers[0].mixer.A_log)


def test_a_fresh_model_in_low_precision_keeps_A_and_D_in_fp32() -> None:
    config = MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, dtype="bfloat16")
    mixer = AutoModelForCausalLM.from_config(config).backbone.layers[0].mixer
    assert (mixer.A_log.dtype, mixer.D.dtype, mixer.in_proj.weight.dtype) == (
        torch.float32, torch.float32, torch.bfloat16,
    )  # fmt: skip


def test_weights_a_file_lacks_are_initialised_and_the_others_are_not(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(rescale_prenorm_residual=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = {"backbone.layers.1.mixer.A_log", "backbone.layers.1.mixer.dt_proj.bias"}
    kept = {name: tensor for name, tensor in tensors.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert torch.equal(state["backbone.layers.1.mixer.A_log"], torch.arange(1.0, 9).log().expand(64, 8))
    assert torch.nn.functional.softplus(state["backbone.layers.1.mixer.dt_proj.bias"]).max() <= 0.1001
