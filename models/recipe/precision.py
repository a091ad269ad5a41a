"""What precision costs: bits per byte of an exported model's held-out files in every form that a server gives weights.

``python -m models.recipe.precision MODEL CORPUS`` measures each form along both ways a token is taken: as part of a
prompt, all at once, and by one step of decode after another. The results go into ``precision.json`` beside the model
as they come, and into its card.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from app.engine.memory import keep_freed_memory
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaForCausalLM
from mamba_core.ops import Packing
from mamba_core.quantization import quantize_int8
from models.recipe.baselines import evaluated_documents
from models.recipe.card import write_card
from models.recipe.evaluate import file_bits, file_rows, load_exported
from models.recipe.progress import say
from models.recipe.tokenizer import load_tokenizer

RESULT = "precision.json"
STEP_ROWS = 32
# what a CPU's caches hold is soon done, and more at once gains nothing there
PROMPT_TOKENS = 4096
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Precision:
    """dtype of weights and activations, and the form of the large matrices: "none" (as the others) or "int8"."""

    dtype: str
    quantization: str

    @classmethod
    def parse(cls, text: str) -> Precision:
        """``float32``, ``bfloat16``, ``float32+int8`` or ``bfloat16+int8``."""
        dtype, _, quantization = text.partition("+")
        if dtype not in _DTYPES or quantization not in ("", "int8"):
            raise argparse.ArgumentTypeError(f"unknown precision {text!r}")
        return cls(dtype, quantization or "none")

    def load(self, folder: Path) -> MambaForCausalLM:
        """The exported model in this precision, on the CPU."""
        model: MambaForCausalLM = load_exported(folder, torch.device("cpu"), _DTYPES[self.dtype])
        if self.quantization == "int8":
            quantize_int8(model)
        return model


@torch.no_grad()
def step_bits(model: MambaForCausalLM, tokenizer: Tokenizer, corpus: Path, every: int = 1) -> dict[str, Any]:
    """``file_bits`` by steps of decode, each of up to ``STEP_ROWS`` files, for one of so many files."""
    texts = evaluated_documents(corpus)[::every]
    rows = file_rows(tokenizer, texts)
    bits = [0.0] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for begin in range(0, len(rows), STEP_ROWS):
        batch = longest_first[begin : begin + STEP_ROWS]
        for index, nats in zip(batch, _step_losses(model, [rows[index] for index in batch]), strict=True):
            bits[index] = nats / math.log(2)
    return {"bits": bits, "bytes": [len(text) for text in texts], "tokens": [len(row) - 2 for row in rows]}


def _step_losses(model: MambaForCausalLM, rows: Sequence[Sequence[int]]) -> list[float]:
    """Summed cross-entropy in nats of all but the first token of each row; no row is longer than the one before it."""
    dtype = model.backbone.embeddings.weight.dtype
    cache = MambaCache.from_config(model.config, len(rows), dtype=dtype)
    totals = torch.zeros(len(rows), dtype=torch.float64)
    num_rows = len(rows)
    for position in range(len(rows[0]) - 1):
        while len(rows[num_rows - 1]) <= position + 1:
            num_rows -= 1
        tokens = torch.tensor([row[position] for row in rows[:num_rows]])
        targets = torch.tensor([row[position + 1] for row in rows[:num_rows]])
        hidden = model.forward_packed(tokens, Packing.step(torch.arange(num_rows)), cache)
        totals[:num_rows] += F.cross_entropy(model.compute_logits(hidden), targets, reduction="none").double()
    return totals.tolist()


def measure(folder: Path, corpus: Path, precisions: Sequence[Precision], step_every: int = 1) -> dict[str, Any]:
    """Every precision along both ways, into ``precision.json`` after each; what stands there is not done again."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    path = folder / RESULT
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": []}
    record["torch"] = torch.__version__
    known = {(result["dtype"], result["quantization"], result["way"]) for result in record["results"]}
    ways = {
        "prompts": partial(file_bits, batch_tokens=PROMPT_TOKENS),
        "steps": partial(step_bits, every=step_every),
    }
    for way, bits_of in ways.items():
        for precision in precisions:
            if (precision.dtype, precision.quantization, way) in known:
                continue
            begin = time.monotonic()
            result = bits_of(precision.load(folder), tokenizer, corpus)
            record["results"].append({**asdict(precision), "way": way, **result})
            path.write_text(json.dumps(record) + "\n")
            share = sum(result["bits"]) / sum(result["bytes"])
            say(f"{precision} {way}: {share:.5f} bits per byte in {time.monotonic() - begin:.0f} s")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the exported model")
    parser.add_argument("corpus", type=Path, help="folder that models.recipe.heldout, or the training, wrote")
    default = [Precision("float32", "none"), Precision("bfloat16", "none"), Precision("bfloat16", "int8")]
    parser.add_argument("--precisions", type=Precision.parse, nargs="+", default=default)
    parser.add_argument("--step-every", type=int, default=1, help="go through one of so many files by steps")
    options = parser.parse_args(arguments)
    # as a server does; without it, most of the time goes into pages that are given back and fetched again
    keep_freed_memory()
    measure(options.model, options.corpus, options.precisions, options.step_every)
    say(f"wrote {write_card(options.model)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
