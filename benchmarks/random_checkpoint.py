"""Write a checkpoint of a published shape with random weights, and a tokenizer in which every token has a text.

python -m benchmarks.random_checkpoint 2.8b /tmp/random-2.8b
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.in_process import SHAPES, VOCAB_SIZE, print_line, random_model

SHIPPED_MODEL = Path(__file__).parents[1] / "models" / "mamba-python-15m"
# how byte-level tokenizers write the space before a word
_SPACE = "\u0120"


def write_checkpoint(shape: str, directory: Path, device: torch.device, seed: int, shard_size: str) -> None:
    """bf16 safetensors in shards, made on ``device``; equal seeds give equal weights on one kind of device."""
    torch.manual_seed(seed)
    model = random_model(shape, device, torch.bfloat16)
    # a matter of initialisation, done; a class that reads the weights must not apply it again
    model.config.rescale_prenorm_residual = False
    model.config.dtype = torch.bfloat16
    model.save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """The shipped model's tokenizer, continued with the words w8192, w8193 ... to the published vocabulary size."""
    content = json.loads((SHIPPED_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"{_SPACE}w{index}": index for index in range(len(vocabulary), VOCAB_SIZE)})
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = (SHIPPED_MODEL / "tokenizer_config.json").read_text(encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(settings, encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="2GB", help="most that one file holds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    if any(options.directory.glob("*.safetensors")):
        print(f"there are weights in {options.directory} already", file=sys.stderr)
        return 1
    started = time.perf_counter()
    write_checkpoint(options.shape, options.directory, torch.device(options.device), options.seed, options.shard_size)
    shards = list(options.directory.glob("*.safetensors"))
    print_line(
        {
            "benchmark": "random_checkpoint",
            "shape": options.shape,
            "files": len(shards),
            "bytes": sum(shard.stat().st_size for shard in shards),
            "seconds": round(time.perf_counter() - started, 2),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
