"""Weights that are missing, damaged, unsafe or of another kind are refused by name before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mamba_core import checkpoints
from mamba_core.checkpoints import UnsupportedModel
from tests.core.checkpoint_files import assert_weights_refused, save, save_shards, write_json


def test_missing_unknown_and_doubled_tensors_are_refused_by_name(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    save({name: t for name, t in tensors.items() if "layers.1.mixer.D" not in name}, file)
    assert_weights_refused(saved, "lack backbone.layers.1.mixer.D$")
    save({name: t for name, t in tensors.items() if "layers.1" not in name}, file)
    assert_weights_refused(saved, "describes 2 layers, the weights hold 1")
    save({name: t for name, t in tensors.items() if "in_proj" not in name and "x_proj" not in name}, file)
    assert_weights_refused(saved, "in_proj.weight, .* and 1 more$")
    save(tensors | {"backbone.layers.0.mixer.extra": torch.zeros(1)}, file)
    assert_weights_refused(saved, "does not have: backbone.layers.0.mixer.extra$")
    save(tensors | {"backbone.embedding.weight": tensors["backbone.embeddings.weight"].clone()}, file)
    assert_weights_refused(saved, "are the same parameter")


def test_tensors_of_mamba2_and_layer_norm_are_recognised(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    save(tensors | {"backbone.layers.0.mixer.dt_bias": torch.zeros(2)}, file)
    with pytest.raises(UnsupportedModel, match="Mamba-2"):
        checkpoints.inspect(saved)
    save(tensors | {"backbone.norm_f.bias": torch.zeros(32)}, file)
    with pytest.raises(UnsupportedModel, match="LayerNorm"):
        checkpoints.inspect(saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_absurd_dtypes_are_refused_by_name(dtype: torch.dtype, suffix: str, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    tensors["backbone.norm_f.weight"] = torch.zeros(32).to(dtype)
    save(tensors, saved / ("pytorch_model.bin" if suffix == ".bin" else "model.safetensors"))
    assert_weights_refused(saved, "backbone.norm_f.weight in .* has dtype")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_files_are_refused(suffix: str, kept: float, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    file = saved / ("pytorch_model.bin" if suffix == ".bin" else "model.safetensors")
    save(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_weights_refused(saved, f"{file.name} is (damaged|refused)")


def test_absurd_headers_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    for content in (b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", b"\0" * 1000):
        file.write_bytes(content)
        assert_weights_refused(saved, "model.safetensors is damaged or truncated")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_old_format", [False, True])
def test_a_pickle_that_would_act_is_refused_and_does_not(is_old_format: bool, saved: Path) -> None:
    tensors: dict[str, Any] = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    victim = saved / "victim"
    tensors["backbone.norm_f.weight"] = Evil(victim)
    torch.save(tensors, saved / "pytorch_model.bin", _use_new_zipfile_serialization=not is_old_format)
    assert_weights_refused(saved, "pytorch_model.bin is refused")
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, {1: torch.zeros(2)}, {"a": torch.eye(3).to_sparse()}, 7],
    ids=["list", "nested", "numbered", "sparse", "number"],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(content: Any, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    assert_weights_refused(saved, "pytorch_model.bin is refused")


def test_broken_indexes_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    assert_weights_refused(saved, "there are no weights")
    save_shards(tensors, saved, "model", ".safetensors")
    name = "model.safetensors.index.json"
    good = json.loads((saved / name).read_text())["weight_map"]

    for broken, message in (
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (good | {"lm_head.weight": "../model.safetensors"}, "cannot be one"),
        (good | {"lm_head.weight": "/etc/passwd"}, "cannot be one"),
        (good | {"lm_head.weight": "model.bin"}, "cannot be one"),
        (good | {"lm_head.weight": "model-9.safetensors"}, "a shard that is missing: model-9.safetensors"),
        (good | {"lm_head.weight": "model-00001-of-00003.safetensors"}, "no shard holds: lm_head.weight"),
    ):
        write_json(saved, {"weight_map": broken}, name)
        assert_weights_refused(saved, message)
    (saved / name).write_text("{")
    assert_weights_refused(saved, "not readable JSON")

    write_json(saved, {"weight_map": good}, name)
    checkpoints.inspect(saved)
    first = saved / "model-00001-of-00003.safetensors"
    second = saved / "model-00002-of-00003.safetensors"
    save(load_file(first) | load_file(second), second)
    assert_weights_refused(saved, "is stored twice")
