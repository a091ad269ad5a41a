"""Four layouts, one model: from every kind of file, in the wanted dtype, on the wanted device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mamba_core import FalconMambaForCausalLM, MambaForCausalLM, checkpoints
from mamba_core.checkpoints import (
    CheckpointError,
    CheckpointNotFound,
    HubUnavailable,
    InvalidConfig,
    InvalidWeights,
    Layout,
    UnsupportedModel,
)
from tests.core.checkpoint_files import (
    STATE_SPACES,
    save,
    save_shards,
    state_of,
    write_fla,
    write_json,
    write_state_spaces,
)

Make = Callable[..., MambaForCausalLM]
Tokens = Callable[..., Tensor]


def assert_same(model: MambaForCausalLM, source: MambaForCausalLM, tokens: Tokens) -> None:
    assert not model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9)).logits, source(tokens(2, 9)).logits)


@pytest.mark.parametrize("layout", list(Layout), ids=str)
def test_every_layout_gives_the_same_logits(
    layout: Layout, source: MambaForCausalLM, tiny_model: Make, tokens: Tokens, tmp_path: Path
) -> None:
    if layout is Layout.FALCON_MAMBA:
        source = tiny_model("falcon_mamba", tie_word_embeddings=False)
    if layout is Layout.STATE_SPACES:
        write_state_spaces(source, tmp_path)
    elif layout is Layout.FLASH_LINEAR_ATTENTION:
        write_fla(source, tmp_path)
    else:
        source.save_pretrained(tmp_path)
    info = checkpoints.inspect(tmp_path)
    assert info.layout is layout
    assert info.num_parameters == sum(p.numel() for p in source.parameters()) + (
        source.lm_head.weight.numel() if layout is Layout.FLASH_LINEAR_ATTENTION else 0
    )
    model = checkpoints.load(tmp_path, show_progress=False)
    assert isinstance(model, FalconMambaForCausalLM) is (layout is Layout.FALCON_MAMBA)
    assert_same(model, source, tokens)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["single", "sharded"])
def test_every_kind_of_file_gives_the_same_logits(
    suffix: str, is_sharded: bool, source: MambaForCausalLM, saved: Path, tokens: Tokens
) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if is_sharded:
        save_shards(tensors, saved, stem, suffix)
    else:
        save(tensors, saved / f"{stem}{suffix}")
    assert len(checkpoints.inspect(saved).files) == (3 if is_sharded else 1)
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_a_bin_file_from_before_torch_1_6_loads(source: MambaForCausalLM, tokens: Tokens, tmp_path: Path) -> None:
    write_json(tmp_path, STATE_SPACES)
    torch.save(state_of(source), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(checkpoints.load(tmp_path, show_progress=False), source, tokens)


def test_safetensors_come_first(source: MambaForCausalLM, saved: Path, tokens: Tokens) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"never read")
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_names_of_a_bare_backbone(source: MambaForCausalLM, saved: Path, tokens: Tokens) -> None:
    source.backbone.save_pretrained(saved)
    assert "embeddings.weight" in load_file(saved / "model.safetensors")
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_converted_files_that_kept_the_papers_keys_are_transformers(
    source: MambaForCausalLM, saved: Path, tokens: Tokens
) -> None:
    leftovers = {"d_model": 32, "n_layer": 2, "d_inner": 160, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True}
    raw = json.loads((saved / "config.json").read_text()) | leftovers
    del raw["tie_word_embeddings"]
    write_json(saved, raw)
    assert checkpoints.inspect(saved).layout is Layout.MAMBA
    assert_same(checkpoints.load(saved, show_progress=False), source, tokens)


def test_settings_of_the_papers_layout(tiny_model: Make, tokens: Tokens, tmp_path: Path) -> None:
    source = tiny_model(
        vocab_size=104, state_size=4, conv_kernel=3, expand=3, time_step_rank=5, use_bias=True, use_conv_bias=False,
        residual_in_fp32=False,
    )  # fmt: skip
    ssm = {"layer": "Mamba1", "d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 5, "bias": True, "conv_bias": False}
    write_state_spaces(source, tmp_path, ssm_cfg=ssm, residual_in_fp32=False, attn_layer_idx=[], d_intermediate=0)
    assert_same(checkpoints.load(tmp_path, show_progress=False), source, tokens)


def test_flash_linear_attention_always_has_a_convolution_bias(
    source: MambaForCausalLM, tokens: Tokens, tmp_path: Path
) -> None:
    write_fla(source, tmp_path, use_conv_bias=False)
    assert_same(checkpoints.load(tmp_path, show_progress=False), source, tokens)


def test_a_tied_head_is_shared_and_a_different_one_is_kept(
    source: MambaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_state_spaces(source, tmp_path)
    model = checkpoints.load(tmp_path, show_progress=False)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert not caplog.records
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = checkpoints.load(tmp_path, show_progress=False)
    assert "lm_head.weight differs" in caplog.text
    assert torch.equal(model.lm_head.weight, 2 * model.backbone.embeddings.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_in_the_wanted_dtype(dtype: torch.dtype, source: MambaForCausalLM, saved: Path) -> None:
    model = checkpoints.load(saved, dtype, "cpu", show_progress=False)
    for name, parameter in model.named_parameters():
        is_kept = name.endswith(("mixer.A_log", "mixer.D"))
        assert parameter.dtype == (torch.float32 if is_kept else dtype), name
        assert torch.equal(parameter, source.get_parameter(name).to(parameter.dtype)), name
    assert model.config.dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("is_pickle", [False, True])
def test_weights_arrive_on_the_gpu(is_pickle: bool, source: MambaForCausalLM, saved: Path) -> None:
    if is_pickle:
        save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
        (saved / "model.safetensors").unlink()
    model = checkpoints.load(saved, torch.bfloat16, "cuda", show_progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cuda", name
        assert torch.equal(parameter.cpu(), source.get_parameter(name).to(parameter.dtype)), name


def test_the_model_does_not_depend_on_the_file_any_more(source: MambaForCausalLM, saved: Path, tokens: Tokens) -> None:
    model = checkpoints.load(saved, show_progress=False)
    size = (saved / "model.safetensors").stat().st_size
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert_same(model, source, tokens)


def test_a_model_loaded_under_inference_mode_can_be_trained(saved: Path, tokens: Tokens) -> None:
    with torch.inference_mode():
        model = checkpoints.load(saved, show_progress=False)
    model(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    assert model.backbone.embeddings.weight.grad is not None


def test_progress_goes_to_stderr_and_can_be_turned_off(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoints.load(saved, show_progress=False)
    assert capfd.readouterr() == ("", "")
    checkpoints.load(saved)
    out, err = capfd.readouterr()
    assert out == ""
    assert "loading weights: 100%" in err


def test_every_error_is_of_the_tree() -> None:
    leaves = {CheckpointNotFound, HubUnavailable, InvalidConfig, InvalidWeights, UnsupportedModel}
    assert set(CheckpointError.__subclasses__()) == leaves
    assert all(leaf.__name__ in str(CheckpointError.__doc__) for leaf in leaves)
