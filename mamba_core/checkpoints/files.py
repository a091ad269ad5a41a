"""Weight files: which there are, what they say they hold, and their tensors, one at a time."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mamba_core.checkpoints.errors import InvalidConfig, InvalidWeights
from mamba_core.checkpoints.layouts import read_json

_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file says about one of its tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def list_tensors(directory: Path) -> list[StoredTensor]:
    """All tensors of a checkpoint, from the files' headers. Safetensors come first. Raises InvalidWeights."""
    files, promised = _find_files(directory)
    tensors = [tensor for file in files for tensor in _read_header(file)]
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise InvalidWeights(f"{tensor.name} is stored twice, the second time in {tensor.file.name}")
        seen.add(tensor.name)
    if absent := sorted(promised - seen):
        raise InvalidWeights(f"the index names tensors that no shard holds: {summary(absent)}")
    return tensors


def read_tensors(file: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the device) of a file, one after the other. Raises InvalidWeights."""
    if file.suffix == ".bin":
        for name, tensor in _unpickle(file, "cpu").items():
            yield name, tensor.to(device)
        return
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for name in stored.keys():  # noqa: SIM118 - the handle is no mapping
                yield name, stored.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def summary(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:100] for name in names[:limit]) + more


def _find_files(directory: Path) -> tuple[list[Path], set[str]]:
    """The weight files of a checkpoint, and the names of the tensors its index promises."""
    for single, index in _SINGLE_AND_INDEX:
        if (directory / single).is_file():
            return [directory / single], set()
        if (directory / index).is_file():
            return _read_index(directory, index)
    names = " or ".join(single for single, _ in _SINGLE_AND_INDEX)
    raise InvalidWeights(f"there are no weights in the model's directory: {names}, or the shards of one")


def _read_index(directory: Path, name: str) -> tuple[list[Path], set[str]]:
    try:
        weight_map = read_json(directory, name).get("weight_map")
    except InvalidConfig as error:
        raise InvalidWeights(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidWeights(f"{name} has no weight_map")
    suffix = Path(name.removesuffix(".index.json")).suffix
    files = []
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        # a name that leads out of the directory is no shard's
        if shard != Path(shard).name or Path(shard).suffix != suffix:
            raise InvalidWeights(f"{name} names a shard that cannot be one: {shard[:100]!r}")
        if not (directory / shard).is_file():
            raise InvalidWeights(f"{name} names a shard that is missing: {shard[:100]}")
        files.append(directory / shard)
    return files, set(weight_map)


def _read_header(file: Path) -> list[StoredTensor]:
    if file.suffix == ".bin":
        tensors = _unpickle(file, "meta")
        return [_stored(file, name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    try:
        with safe_open(file, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            return [_stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def _stored(file: Path, name: str, shape: tuple[int, ...], dtype: Any) -> StoredTensor:
    known = dtype if dtype in DTYPES.values() else DTYPES.get(dtype)
    if known is None:
        raise InvalidWeights(f"{name} in {file.name} has dtype {dtype}: weights are floating point of 16 to 64 bits")
    return StoredTensor(name, shape, known, file)


def _unpickle(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a .bin file. Nothing in it is executed: what is more than tensors is refused."""
    try:
        content = _torch_load(file, device)
    except pickle.UnpicklingError as error:
        raise InvalidWeights(f"{file.name} is refused: it is damaged or holds more than tensors") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(file, error) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InvalidWeights(f"{file.name} is refused: it does not hold named tensors")
    for name, value in content.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
            raise InvalidWeights(f"{file.name} is refused: {name[:100]} is not a plain tensor")
    return content


def _torch_load(file: Path, device: str) -> Any:
    try:
        return torch.load(file, map_location=device, weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location=device, weights_only=True)  # the format from before torch 1.6


def damaged(file: Path, error: Exception) -> InvalidWeights:
    """What to raise when a file cannot be read as what it is."""
    return InvalidWeights(f"{file.name} is damaged or truncated ({type(error).__name__})")
