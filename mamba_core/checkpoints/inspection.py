"""Whether a checkpoint can be loaded, found out from its small files and headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mamba_core.bases import no_init_weights
from mamba_core.checkpoints.errors import InvalidConfig, InvalidWeights, UnsupportedModel
from mamba_core.checkpoints.files import StoredTensor, list_tensors, summary
from mamba_core.checkpoints.layouts import Layout, eos_token_ids, read_config
from mamba_core.configuration_mamba import FalconMambaConfig, MambaConfig
from mamba_core.modeling_mamba import FalconMambaForCausalLM, MambaForCausalLM

HEAD = "lm_head.weight"
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.")
_MAMBA2_TENSORS = ("mixer.dt_bias", "mixer.norm.weight")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint that fits its configuration. ``tensors`` are keyed by the model's parameter names."""

    directory: Path
    layout: Layout
    config: MambaConfig
    tensors: Mapping[str, StoredTensor]

    @property
    def num_parameters(self) -> int:
        """Parameters, counting a tied head once."""
        skipped = {HEAD} if self.config.tie_word_embeddings else set()
        return sum(torch.Size(t.shape).numel() for name, t in self.tensors.items() if name not in skipped)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))


def inspect(path: Path | str) -> CheckpointInfo:
    """Check a checkpoint's directory without reading its weights.

    Raises InvalidConfig, UnsupportedModel or InvalidWeights, each with one line that says what is wrong.
    """
    directory = Path(path)
    layout, config = read_config(directory)
    eos_token_ids(directory, config)
    tensors = _rename(list_tensors(directory))
    if layout is Layout.FLASH_LINEAR_ATTENTION:
        # its mixer has a convolution bias whatever its configuration says
        config.use_conv_bias = "backbone.layers.0.mixer.conv1d.bias" in tensors
    _check_names(tensors, config)
    return CheckpointInfo(directory, layout, config, tensors)


def empty_model(config: MambaConfig) -> MambaForCausalLM:
    """The model of a configuration with parameters on the meta device."""
    is_falcon = isinstance(config, FalconMambaConfig)
    model_class = FalconMambaForCausalLM if is_falcon else MambaForCausalLM
    try:
        with torch.device("meta"), no_init_weights():
            return model_class(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise InvalidConfig(f"config.json describes a model too large to exist ({type(error).__name__})") from error


def our_name(stored_name: str) -> str:
    """The parameter a stored tensor belongs to: the layouts differ in a prefix and in one letter."""
    name = stored_name.removeprefix("model.").removeprefix("backbone.")
    name = re.sub(r"^embedding\.", "embeddings.", name)
    return f"backbone.{name}" if re.match(r"(embeddings|layers|norm_f)\.", name) else name


def _rename(stored: list[StoredTensor]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for tensor in stored:
        name = our_name(tensor.name)
        if name in tensors:
            raise InvalidWeights(f"{tensors[name].name} and {tensor.name} are the same parameter")
        tensors[name] = tensor
    return tensors


def _check_names(tensors: Mapping[str, StoredTensor], config: MambaConfig) -> None:
    if any(name.endswith(_MAMBA2_TENSORS) for name in tensors):
        raise UnsupportedModel("Mamba-2 is not supported (its tensors are in the weights)")
    if any(name.endswith(("norm.bias", "norm_f.bias")) for name in tensors):
        raise UnsupportedModel("LayerNorm is not supported (norms with a bias are in the weights)")
    layers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    if len(layers) != config.num_hidden_layers:
        raise InvalidWeights(f"config.json describes {config.num_hidden_layers} layers, the weights hold {len(layers)}")
    expected = {name: tuple(p.shape) for name, p in empty_model(config).state_dict().items()}
    optional = {HEAD} if config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - optional - tensors.keys()):
        raise InvalidWeights(f"the weights lack {summary(missing)}")
    if unknown := sorted(tensors[name].name for name in tensors.keys() - expected.keys()):
        raise InvalidWeights(f"the weights hold tensors the model does not have: {summary(unknown)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise InvalidWeights(
                f"{tensor.name} in {tensor.file.name} has shape {tensor.shape}, config.json asks for {expected[name]}"
            )
