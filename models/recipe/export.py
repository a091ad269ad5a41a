"""Writes the trained model as people load it, in bf16 shards, and packs its folder into few files for transfer."""

from __future__ import annotations

import copy
import tarfile
from pathlib import Path
from typing import Any

import torch

# three even shards for the shipped model, each well below what repositories and transfers balk at
MAX_SHARD_BYTES = 10_500_000

# the recurrence is exponential in these two: they keep the precision they were trained in
_KEPT_IN_FP32 = ("A_log", ".D")


def export_model(model: Any, folder: Path) -> None:
    """Save a copy of ``model`` in bf16, ``A_log`` and ``D`` in fp32, with its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    exported = copy.deepcopy(model).cpu().eval()
    for name, parameter in exported.named_parameters():
        if not name.endswith(_KEPT_IN_FP32):
            parameter.data = parameter.data.to(torch.bfloat16)
    exported.config.dtype = torch.bfloat16
    # a matter of initialisation, done; transformers' own class would apply it to the loaded weights once more
    exported.config.rescale_prenorm_residual = False
    exported.config.architectures = [type(model).__name__]
    exported.generation_config.eos_token_id = model.config.eos_token_id
    exported.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)


def weight_bytes(folder: Path) -> int:
    """The size of all shards in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def pack(model_folder: Path, out: Path) -> None:
    """Copy a model folder into ``out`` as at most a handful of files: each shard, and one tar of all the rest."""
    out.mkdir(parents=True, exist_ok=True)
    for shard in sorted(model_folder.glob("*.safetensors")):
        (out / shard.name).write_bytes(shard.read_bytes())
    with tarfile.open(out / "rest.tar", "w") as tar:
        for path in sorted(model_folder.iterdir()):
            if path.suffix != ".safetensors":
                tar.add(path, arcname=path.name)


def unpack(packed: Path, model_folder: Path) -> None:
    """The reverse of ``pack``."""
    model_folder.mkdir(parents=True, exist_ok=True)
    for shard in sorted(packed.glob("*.safetensors")):
        (model_folder / shard.name).write_bytes(shard.read_bytes())
    with tarfile.open(packed / "rest.tar") as tar:
        # what would keep extractall from writing elsewhere is missing in the first releases of Python 3.11
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                raise ValueError(f"{member.name} in {packed / 'rest.tar'} is no file")
            (model_folder / Path(member.name).name).write_bytes(content.read())
