"""Checkpoints as others write them, whole or damaged, and how one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mamba_core import MambaForCausalLM, checkpoints
from mamba_core.checkpoints import CheckpointError, InvalidWeights

STATE_SPACES = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 101,
    "ssm_cfg": {"d_state": 8},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
FLA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 104,
    "norm_eps": 1e-5,
    "residual_in_fp32": True,
    "fuse_norm": True,
    "fuse_cross_entropy": True,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def state_of(model: MambaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_json(directory: Path, content: Any, name: str = "config.json") -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(content))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def save_shards(tensors: dict[str, Tensor], directory: Path, stem: str, suffix: str) -> None:
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00003{suffix}": names[i::3] for i in range(3)}
    for shard, members in shards.items():
        save({name: tensors[name] for name in members}, directory / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    write_json(directory, {"metadata": {}, "weight_map": weight_map}, f"{stem}{suffix}.index.json")


def write_state_spaces(model: MambaForCausalLM, directory: Path, **changes: Any) -> None:
    write_json(directory, STATE_SPACES | changes)
    tensors = {name.replace("embeddings", "embedding"): t for name, t in state_of(model).items()}
    save(tensors, directory / "pytorch_model.bin")


def write_fla(model: MambaForCausalLM, directory: Path, **changes: Any) -> None:
    write_json(directory, FLA | changes)
    save(state_of(model), directory / "model.safetensors")


def assert_one_clear_line(error: CheckpointError, directory: Path) -> None:
    message = str(error)
    assert message
    assert "\n" not in message
    assert str(directory) not in message
    assert len(message) < 500


def assert_weights_refused(directory: Path, message: str) -> None:
    for call in (checkpoints.inspect, checkpoints.load):
        with pytest.raises(InvalidWeights, match=message) as caught:
            call(directory)
        assert_one_clear_line(caught.value, directory)
