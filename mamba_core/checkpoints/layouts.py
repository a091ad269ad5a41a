"""The four layouts of ``config.json``, translated to one configuration, and what is refused by name."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from mamba_core.checkpoints.errors import InvalidConfig, UnsupportedModel
from mamba_core.configuration_mamba import FalconMambaConfig, MambaConfig

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"


class Layout(StrEnum):
    MAMBA = "mamba"
    FALCON_MAMBA = "falcon_mamba"
    STATE_SPACES = "state-spaces"
    FLASH_LINEAR_ATTENTION = "flash-linear-attention"


# what flash-linear-attention calls layer_norm_epsilon, and writes into every file
_FLA_KEY = "norm_eps"
# what its class assumes where a file says nothing
_FLA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
}
# the paper's names of a layer's settings, to ours
_SSM_NAMES = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_SSM_WITHOUT_MEANING = {"layer", "use_fast_path"}
# written by transformers into any config.json, about the file and not about the model
_BOOKKEEPING = ("model_type", "transformers_version", "auto_map", "_name_or_path", "_attn_implementation_autoset")


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file. Raises InvalidConfig."""
    try:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidConfig(f"there is no {name} in the model's directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"{name} is not readable JSON: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise InvalidConfig(f"{name} holds no JSON object")
    return content


def read_config(directory: Path) -> tuple[Layout, MambaConfig]:
    """The layout of a checkpoint and its configuration. Raises InvalidConfig or UnsupportedModel."""
    raw = read_json(directory, CONFIG_FILE)
    layout = _detect(raw)
    _refuse_other_layers(raw)
    if layout is Layout.STATE_SPACES:
        raw = _from_state_spaces(raw)
    elif layout is Layout.FLASH_LINEAR_ATTENTION:
        raw = _FLA_DEFAULTS | raw
    settings = {name: value for name, value in raw.items() if name not in _BOOKKEEPING}
    config_class = FalconMambaConfig if layout is Layout.FALCON_MAMBA else MambaConfig
    try:
        return layout, config_class(**settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidConfig(f"{CONFIG_FILE}: {one_line(error)}") from error


def eos_token_ids(directory: Path, config: MambaConfig) -> tuple[int, ...]:
    """The tokens that end a text: those of ``generation_config.json``, else those of the configuration.

    Raises InvalidConfig if they are no token ids of the model.
    """
    ids: Any = None
    if (directory / GENERATION_CONFIG_FILE).exists():
        ids = read_json(directory, GENERATION_CONFIG_FILE).get("eos_token_id")
    if ids is None:
        ids = config.eos_token_id
    if ids is None:
        return ()
    several = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    for token_id in several:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
            raise InvalidConfig(f"eos_token_id {token_id!r} is not a token of a vocabulary of {config.vocab_size}")
    return tuple(dict.fromkeys(several))


def _detect(raw: dict[str, Any]) -> Layout:
    if "quantization_config" in raw:
        raise UnsupportedModel("quantized weights are not supported (quantization_config)")
    model_type = raw.get("model_type")
    if model_type is None and "d_model" in raw and "n_layer" in raw:
        return Layout.STATE_SPACES
    if model_type is None:
        raise InvalidConfig(f"{CONFIG_FILE} has no model_type")
    if model_type == "mamba2":
        raise UnsupportedModel("Mamba-2 is not supported (model_type 'mamba2')")
    if model_type == "falcon_mamba":
        return Layout.FALCON_MAMBA
    if model_type != "mamba":
        raise UnsupportedModel(f"model_type {str(model_type)[:60]!r} is not supported: 'mamba' or 'falcon_mamba'")
    return Layout.FLASH_LINEAR_ATTENTION if _FLA_KEY in raw else Layout.MAMBA


def _refuse_other_layers(raw: dict[str, Any]) -> None:
    ssm = raw.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise InvalidConfig(f"{CONFIG_FILE}: ssm_cfg must be an object")
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba1":
        name = "Mamba-2" if layer == "Mamba2" else str(layer)[:60]
        raise UnsupportedModel(f"{name} is not supported (ssm_cfg layer {str(layer)[:60]!r})")
    if raw.get("rms_norm") is False:
        raise UnsupportedModel("LayerNorm is not supported (rms_norm false)")
    if raw.get("attn_layer_idx") or raw.get("attn"):
        name = "attn_layer_idx" if raw.get("attn_layer_idx") else "attn"
        raise UnsupportedModel(f"attention layers are not supported ({name})")
    if raw.get("d_intermediate"):
        raise UnsupportedModel("MLP layers are not supported (d_intermediate)")


def _from_state_spaces(raw: dict[str, Any]) -> dict[str, Any]:
    ssm = raw.get("ssm_cfg") or {}
    unknown = sorted(set(ssm) - set(_SSM_NAMES) - _SSM_WITHOUT_MEANING)
    if unknown:
        raise InvalidConfig(f"{CONFIG_FILE}: ssm_cfg has unknown settings: {', '.join(unknown)[:200]}")
    return {
        "vocab_size": _padded(raw.get("vocab_size"), raw.get("pad_vocab_size_multiple", 8)),
        "hidden_size": raw["d_model"],
        "num_hidden_layers": raw["n_layer"],
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "tie_word_embeddings": raw.get("tie_embeddings", True),
        "initializer_range": 0.02,
        "rescale_prenorm_residual": True,
        **{_SSM_NAMES[name]: value for name, value in ssm.items() if name in _SSM_NAMES},
    }


def _padded(vocab_size: Any, multiple: Any) -> int:
    for name, value in (("vocab_size", vocab_size), ("pad_vocab_size_multiple", multiple)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidConfig(f"{CONFIG_FILE}: {name} must be an integer of at least 1, got {value!r}")
    return int(-(-vocab_size // multiple) * multiple)


def one_line(error: Exception) -> str:
    """What an error says, short and without line breaks."""
    return " ".join(str(error).split())[:300]
