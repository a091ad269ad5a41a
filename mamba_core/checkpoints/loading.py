"""From a checkpoint's files to a model on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mamba_core.bases import IS_SERVING_ONLY
from mamba_core.checkpoints.errors import InvalidConfig, InvalidWeights
from mamba_core.checkpoints.files import read_tensors
from mamba_core.checkpoints.inspection import HEAD, CheckpointInfo, empty_model, inspect, our_name
from mamba_core.checkpoints.layouts import GENERATION_CONFIG_FILE, eos_token_ids, one_line, read_json
from mamba_core.checkpoints.staging import read_staged
from mamba_core.modeling_mamba import MambaForCausalLM

_EMBEDDINGS = "backbone.embeddings.weight"
_KEPT_IN_FP32 = ("mixer.A_log", "mixer.D")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

OnBytes = Callable[[int], object]

logger = logging.getLogger(__name__)


def load(
    source: Path | str | CheckpointInfo,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    show_progress: bool = True,
) -> MambaForCausalLM:
    """The model of a checkpoint, in eval mode, its weights in ``dtype`` on ``device``.

    source: the checkpoint's directory, or what ``inspect`` found there, which is then not looked at once more.
    A_log and D stay in fp32. Beside the weights no more exists at any time than one of the tensors, or on a GPU what
    ``staging`` says. The progress bar goes to stderr.
    Raises InvalidConfig, UnsupportedModel or InvalidWeights.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be a floating-point type of 16 to 64 bits, got {dtype}")
    info = source if isinstance(source, CheckpointInfo) else inspect(source)
    model = empty_model(info.config)
    # parameters made under inference mode could never be trained or watched for changes
    with torch.inference_mode(False):
        _fill(model, info, dtype, torch.device(device), show_progress)
    info.config.dtype = dtype
    info.config.name_or_path = str(info.directory)
    if not IS_SERVING_ONLY:
        model.generation_config = _generation_config(info)
    model.eval()
    return model


def _fill(model: MambaForCausalLM, info: CheckpointInfo, dtype: torch.dtype, device: torch.device, show: bool) -> None:
    head: Tensor | None = None
    is_staged = device.type == "cuda" and all(file.suffix != ".bin" for file in info.files)
    read = _read_staged if is_staged else _read_in_turn
    with tqdm(total=info.num_bytes, unit="B", unit_scale=True, desc="loading weights", disable=not show) as bar:
        for name, value in read(info, dtype, device, bar.update):
            if name == HEAD:
                head = value
            else:
                _set(model, name, value)
    _set_head(model, head)


def _read_staged(
    info: CheckpointInfo, dtype: torch.dtype, device: torch.device, on_bytes: OnBytes
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all files at once: no bytes but those of the staging memory exist twice."""
    tensors = read_staged(
        info.tensors.values(), lambda stored: _wanted_dtype(our_name(stored.name), dtype), device, on_bytes
    )
    for name, stored in info.tensors.items():
        yield name, tensors[stored.name]


def _read_in_turn(
    info: CheckpointInfo, dtype: torch.dtype, device: torch.device, on_bytes: OnBytes
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file after the other: no more than one tensor exists twice."""
    for file in info.files:
        for stored_name, tensor in read_tensors(file, device):
            name = our_name(stored_name)
            if name not in info.tensors or tuple(tensor.shape) != info.tensors[name].shape:
                raise InvalidWeights(f"{file.name} changed while it was being read")
            # a copy even where nothing changes: the tensor may be a view of the file
            yield name, tensor.detach().to(_wanted_dtype(name, dtype), copy=True).contiguous()
            on_bytes(tensor.nbytes)


def _wanted_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(_KEPT_IN_FP32) else dtype


def _set_head(model: MambaForCausalLM, head: Tensor | None) -> None:
    embeddings = model.backbone.embeddings.weight
    if model.config.tie_word_embeddings and head is not None and not torch.equal(head, embeddings):
        logger.warning("tie_word_embeddings is true, but lm_head.weight differs from the embeddings and is used")
        model.config.tie_word_embeddings = False
    if model.config.tie_word_embeddings or head is None:
        model.lm_head.weight = embeddings
    else:
        _set(model, HEAD, head)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter_name, nn.Parameter(value))


def _generation_config(info: CheckpointInfo) -> Any:
    from transformers import GenerationConfig

    directory, settings = info.directory, {}
    if (directory / GENERATION_CONFIG_FILE).exists():
        settings = read_json(directory, GENERATION_CONFIG_FILE)
    special = {"bos_token_id": info.config.bos_token_id, "pad_token_id": info.config.pad_token_id}
    try:
        generation_config = GenerationConfig.from_dict(special | settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidConfig(f"{GENERATION_CONFIG_FILE} is refused by transformers: {one_line(error)}") from error
    ids = eos_token_ids(directory, info.config)
    generation_config.eos_token_id = list(ids) if len(ids) > 1 else next(iter(ids), None)
    return generation_config
