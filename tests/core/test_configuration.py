"""Both families of field names mean the same, files travel both ways, and nonsense is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.falcon_mamba.configuration_falcon_mamba import FalconMambaConfig as TheirFalconConfig
from transformers.models.mamba.configuration_mamba import MambaConfig as TheirConfig

from mamba_core import FalconMambaConfig, MambaConfig

UNUSUAL = {
    "vocab_size": 320,
    "hidden_size": 48,
    "state_size": 5,
    "num_hidden_layers": 3,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 7,
    "bos_token_id": 8,
    "eos_token_id": [9, 10],
    "expand": 3,
    "conv_kernel": 3,
    "use_bias": True,
    "use_conv_bias": False,
    "hidden_act": "swish",
    "initializer_range": 0.03,
    "residual_in_fp32": False,
    "time_step_rank": 4,
    "time_step_scale": 2.0,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_init_scheme": "constant",
    "time_step_floor": 1e-3,
    "rescale_prenorm_residual": True,
    "use_cache": False,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("norm_eps", "layer_norm_epsilon", 1e-6),
        ("dt_rank", "time_step_rank", 5),
        ("dt_scale", "time_step_scale", 0.5),
        ("dt_min", "time_step_min", 0.01),
        ("dt_max", "time_step_max", 0.5),
        ("dt_init_scheme", "time_step_init_scheme", "constant"),
        ("dt_init_floor", "time_step_floor", 1e-5),
    ],
)
def test_both_names_are_one_setting(alias: str, name: str, value: Any) -> None:
    by_alias, by_name = MambaConfig(**{alias: value}), MambaConfig(**{name: value})
    for config in (by_alias, by_name):
        assert getattr(config, alias) == getattr(config, name) == value
    assert by_alias.to_dict() == by_name.to_dict()
    setattr(by_alias, alias, getattr(MambaConfig(), name))
    assert getattr(by_alias, name) == getattr(MambaConfig(), name)


def test_two_names_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="dt_rank 3 and time_step_rank 4"):
        MambaConfig(dt_rank=3, time_step_rank=4)


def test_derived_sizes() -> None:
    config = MambaConfig(hidden_size=100)
    assert (config.intermediate_size, config.time_step_rank) == (200, 7)
    # tiiuae/falcon-mamba-7b says expand 16 beside a smaller intermediate_size, which is the true one
    assert MambaConfig(hidden_size=4096, expand=16, intermediate_size=8192).intermediate_size == 8192


@pytest.mark.parametrize(
    ("ours", "theirs"), [(MambaConfig, TheirConfig), (FalconMambaConfig, TheirFalconConfig)], ids=["mamba", "falcon"]
)
@pytest.mark.parametrize("extra", [{}, {"intermediate_size": 80}], ids=["expand", "intermediate_size"])
def test_files_travel_both_ways(ours: type[MambaConfig], theirs: type, extra: dict[str, int], tmp_path: Path) -> None:
    settings = UNUSUAL | extra
    if ours is FalconMambaConfig:
        settings["mixer_rms_eps"] = 1e-4
    ours(**settings).save_pretrained(tmp_path / "ours")
    theirs(**settings).save_pretrained(tmp_path / "theirs")
    read_by_them, read_by_us = theirs.from_pretrained(tmp_path / "ours"), ours.from_pretrained(tmp_path / "theirs")
    assert ours.from_pretrained(tmp_path / "ours").to_dict() == ours(**settings).to_dict()
    expected = settings | {"intermediate_size": extra.get("intermediate_size", 144)}
    for name, value in expected.items():
        assert getattr(read_by_them, name) == getattr(read_by_us, name) == value


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = MambaConfig().to_dict(), TheirConfig().to_dict()
    assert {name: ours[name] for name in theirs if name in ours} == {
        name: theirs[name] for name in theirs if name in ours
    }
    assert FalconMambaConfig().mixer_rms_eps == TheirFalconConfig().mixer_rms_eps


def test_fields_of_flash_linear_attention_are_kept(tmp_path: Path) -> None:
    theirs = {
        "model_type": "mamba",
        "norm_eps": 1e-6,
        "fuse_norm": True,
        "fuse_cross_entropy": True,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(UNUSUAL | theirs | {"layer_norm_epsilon": 1e-6}))
    config = MambaConfig.from_pretrained(tmp_path)
    assert (config.norm_eps, config.fuse_norm, config.hidden_size) == (1e-6, True, 48)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", True),
        ("vocab_size", None),
        ("hidden_size", -1),
        ("hidden_size", 32.0),
        ("state_size", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("expand", 0),
        ("expand", 1.5),
        ("intermediate_size", 0),
        ("conv_kernel", 1),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", 0.0),
        ("norm_eps", "1e-5"),
        ("hidden_act", "gelu"),
        ("initializer_range", -0.1),
        ("initializer_range", float("inf")),
        ("time_step_rank", 0),
        ("dt_rank", "none"),
        ("time_step_min", 0.0),
        ("dt_min", 0.2),
        ("dt_max", 1e-4),
        ("time_step_floor", -1.0),
        ("dt_init_scheme", "uniform"),
        ("time_step_scale", float("nan")),
        ("use_bias", "yes"),
        ("tie_word_embeddings", 1),
        ("eos_token_id", "</s>"),
        ("pad_token_id", [0]),
        ("bos_token_id", 1.0),
        ("use_l2warp", True),
        ("mixer_rms_eps", 1e-6),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        MambaConfig(**{field: value})


@pytest.mark.parametrize("value", [0.0, float("nan"), None])
def test_nonsense_of_falcon_is_refused_by_name(value: float | None) -> None:
    with pytest.raises(ValueError, match="mixer_rms_eps"):
        FalconMambaConfig(mixer_rms_eps=value)
