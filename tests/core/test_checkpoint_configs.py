"""What config.json and generation_config.json say is understood, or refused by name before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mamba_core import MambaForCausalLM, checkpoints
from mamba_core.checkpoints import CheckpointError, InvalidConfig, InvalidWeights, UnsupportedModel
from tests.core.checkpoint_files import assert_one_clear_line, write_json, write_state_spaces


def test_ends_of_text(saved: Path) -> None:
    config = checkpoints.inspect(saved).config
    (saved / "generation_config.json").unlink()
    assert checkpoints.eos_token_ids(saved, config) == (0,)
    config.eos_token_id = [5, 6, 5]
    assert checkpoints.eos_token_ids(saved, config) == (5, 6)
    config.eos_token_id = None
    assert checkpoints.eos_token_ids(saved, config) == ()
    write_json(saved, {"eos_token_id": [7, 8], "max_new_tokens": 3}, "generation_config.json")
    assert checkpoints.eos_token_ids(saved, config) == (7, 8)
    model = checkpoints.load(saved, show_progress=False)
    assert model.generation_config.eos_token_id == [7, 8]
    assert model.generation_config.max_new_tokens == 3
    for nonsense in (104, -1, "</s>", True):
        write_json(saved, {"eos_token_id": nonsense}, "generation_config.json")
        with pytest.raises(InvalidConfig, match="eos_token_id"):
            checkpoints.inspect(saved)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "mamba2"}, UnsupportedModel, "Mamba-2 is not supported"),
        ({"model_type": "llama"}, UnsupportedModel, "model_type 'llama' is not supported"),
        ({"model_type": 5}, UnsupportedModel, "model_type '5' is not supported"),
        ({"model_type": None}, InvalidConfig, "has no model_type"),
        ({"rms_norm": False}, UnsupportedModel, "LayerNorm is not supported"),
        ({"attn": {"layers": [1]}}, UnsupportedModel, "attention layers are not supported"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModel, "quantized weights are not supported"),
        ({"state_size": 0}, InvalidConfig, "config.json: state_size"),
        ({"hidden_act": "gelu"}, InvalidConfig, "config.json: hidden_act"),
        ({"layer_types": ["full_attention"]}, InvalidConfig, "config.json: .*layer_types"),
        ({"dtype": "float3"}, InvalidConfig, "config.json: .*float3"),
        ({"hidden_size": 10**12, "intermediate_size": 10**12}, InvalidConfig, "too large to exist"),
        ({"num_hidden_layers": 10**9}, InvalidConfig, "config.json: num_hidden_layers"),
        ({"num_hidden_layers": 99_999}, InvalidWeights, "describes 99999 layers, the weights hold 2"),
        ({"hidden_size": 48}, InvalidWeights, r"has shape .* config.json asks for"),
        ({"vocab_size": 200}, InvalidWeights, r"embeddings.weight .* has shape \(104, 32\)"),
        ({"tie_word_embeddings": False}, InvalidWeights, "the weights lack lm_head.weight"),
        ({"use_bias": True}, InvalidWeights, "the weights lack .*proj.bias"),
        ({"use_conv_bias": False}, InvalidWeights, "tensors the model does not have: .*conv1d.bias"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_configurations_are_refused_by_name(
    changes: dict[str, Any], error: type[CheckpointError], message: str, saved: Path
) -> None:
    raw = json.loads((saved / "config.json").read_text()) | changes
    write_json(saved, raw)
    with pytest.raises(error, match=message) as caught:
        checkpoints.inspect(saved)
    assert_one_clear_line(caught.value, saved)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, UnsupportedModel, "Mamba-2 is not supported"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, UnsupportedModel, "Mamba3 is not supported"),
        ({"ssm_cfg": {"heads": 4}}, InvalidConfig, "unknown settings: heads"),
        ({"ssm_cfg": [1]}, InvalidConfig, "ssm_cfg must be an object"),
        ({"rms_norm": False}, UnsupportedModel, "LayerNorm is not supported"),
        ({"attn_layer_idx": [1]}, UnsupportedModel, "attention layers are not supported"),
        ({"d_intermediate": 64}, UnsupportedModel, "MLP layers are not supported"),
        ({"vocab_size": "big"}, InvalidConfig, "vocab_size"),
        ({"pad_vocab_size_multiple": 0}, InvalidConfig, "pad_vocab_size_multiple"),
        ({"d_model": -32}, InvalidConfig, "hidden_size"),
    ],
)
def test_configurations_of_the_papers_layout_are_refused_by_name(
    changes: dict[str, Any], error: type[CheckpointError], message: str, source: MambaForCausalLM, tmp_path: Path
) -> None:
    write_state_spaces(source, tmp_path, **changes)
    with pytest.raises(error, match=message) as caught:
        checkpoints.inspect(tmp_path)
    assert_one_clear_line(caught.value, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b"[]", "holds no JSON object"),
        (None, "there is no config.json"),
    ],
    ids=["empty", "broken", "no text", "deep", "list", "missing"],
)
def test_a_config_file_that_is_none_is_refused(content: bytes | None, message: str, saved: Path) -> None:
    if content is None:
        (saved / "config.json").unlink()
    else:
        (saved / "config.json").write_bytes(content)
    with pytest.raises(InvalidConfig, match=message):
        checkpoints.inspect(saved)
