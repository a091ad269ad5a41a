"""Weights that come in pieces through staging memory are the bits that are in the files, or there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mamba_core.checkpoints.errors import InvalidWeights
from mamba_core.checkpoints.files import StoredTensor, list_tensors
from mamba_core.checkpoints.staging import read_staged

CPU = torch.device("cpu")
# empty, without dimensions, and of odd sizes, so that tensors of two bytes an element begin anywhere
SHAPES = {"a": (3,), "b": (37, 11), "c": (0, 4), "d": (), "e": (1, 5, 7), "f": (300,)}


def save_shards(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    tensors["g"] = torch.randn(5).half()
    names = list(tensors)
    index = {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    return tensors


def read(
    stored: list[StoredTensor], dtype: torch.dtype, device: torch.device = CPU, **options: int
) -> dict[str, Tensor]:
    seen: list[int] = []
    tensors = read_staged(stored, lambda _: dtype, device, seen.append, **options)
    assert sum(seen) == sum(tensor.num_bytes for tensor in stored)
    return tensors


@pytest.mark.parametrize("piece_bytes", [8, 24, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_bit_arrives(stored: torch.dtype, dtype: torch.dtype, piece_bytes: int, tmp_path: Path) -> None:
    expected = save_shards(tmp_path, stored)
    found = read(list_tensors(tmp_path), dtype, piece_bytes=piece_bytes, num_readers=3)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.gpu
@pytest.mark.parametrize("piece_bytes", [8, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_bit_arrives_on_a_gpu(dtype: torch.dtype, piece_bytes: int, tmp_path: Path) -> None:
    expected = save_shards(tmp_path, torch.bfloat16)
    # long enough that buffers are filled again while their copies are under way
    expected["long"] = torch.randn(3_000_001).to(torch.bfloat16)
    save_file({"long": expected["long"]}, tmp_path / "model-2.safetensors")
    stored = list_tensors(tmp_path)
    stored.append(StoredTensor("long", (3_000_001,), torch.bfloat16, tmp_path / "model-2.safetensors"))
    if piece_bytes == 8:
        stored.pop()
    found = read(stored, dtype, torch.device("cuda"), piece_bytes=piece_bytes, num_readers=3)
    for tensor in stored:
        assert torch.equal(found[tensor.name].cpu(), expected[tensor.name].to(dtype)), tensor.name


def test_a_file_that_changed_since_it_was_looked_at_is_refused(tmp_path: Path) -> None:
    save_shards(tmp_path, torch.float32)
    stored = list_tensors(tmp_path)
    file = tmp_path / "model-1.safetensors"
    content = file.read_bytes()
    for change in (b'"e":{"dtype":"F16"', b'"E":{"dtype":"F32"', b'"e":{"dtype":"I32"', b'"e":[{"dtype":"F32"'):
        old = b'"e":{"dtype":"F32"'
        assert old in content
        file.write_bytes(content.replace(old, change))
        with pytest.raises(InvalidWeights, match=r"model-1\.safetensors (changed while|is damaged)"):
            read(stored, torch.float32)
    file.unlink()
    with pytest.raises(InvalidWeights, match=r"model-1\.safetensors is damaged or truncated \(FileNotFoundError\)"):
        read(stored, torch.float32)


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -400])
def test_a_file_that_was_cut_since_is_refused(kept: int, tmp_path: Path) -> None:
    save_shards(tmp_path, torch.float32)
    stored = list_tensors(tmp_path)
    file = tmp_path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InvalidWeights, match=r"model-1\.safetensors (changed while|is damaged)"):
        read(stored, torch.float32, piece_bytes=64)
