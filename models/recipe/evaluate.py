"""Measures an exported model on the held-out files: bits per byte, loss by position, and fixed completions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mamba_core.configuration_mamba import MambaConfig
from mamba_core.modeling_mamba import MambaForCausalLM
from models.recipe.baselines import evaluated_documents, measure_once
from models.recipe.corpus import Documents
from models.recipe.model import new_model, token_losses
from models.recipe.progress import say
from models.recipe.prompts import PROMPTS
from models.recipe.tokenizer import END_OF_TEXT_ID, load_tokenizer

BATCH_TOKENS = 65_536
NEW_TOKENS = 96
UNTRAINED_SEED = 1


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """long_factor: how many times the training length the loss by position reaches."""

    corpus: Path
    model: Path
    row_length: int = 1024
    long_factor: int = 8
    workers: int = 8

    @property
    def bucket_tokens(self) -> int:
        """Positions per bucket of the loss by position: four buckets inside the training length."""
        return max(1, self.row_length // 4)


def evaluate(settings: EvaluationSettings, device: torch.device, result_path: Path) -> dict[str, Any]:
    """Every measurement, written to ``result_path`` after each so that none is lost to a failure of the next."""
    tokenizer = load_tokenizer(settings.model / "tokenizer.json")
    model = load_exported(settings.model, device)
    untrained = new_model(MambaConfig.from_pretrained(settings.model), UNTRAINED_SEED, device).eval()
    parts: dict[str, Callable[[], Any]] = {
        "device": lambda: torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "trained": lambda: file_bits(model, tokenizer, settings.corpus),
        "untrained": lambda: file_bits(untrained, tokenizer, settings.corpus),
        "by_position": lambda: loss_by_position(model, tokenizer, settings),
        "completions": lambda: completions(model, tokenizer),
        "baselines": lambda: measure_once(settings.corpus, settings.workers),
    }
    results: dict[str, Any] = {}
    for name, measure in parts.items():
        begin = time.monotonic()
        results[name] = measure()
        result_path.write_text(json.dumps(results, indent=1))
        say(f"evaluation: {name} in {time.monotonic() - begin:.1f} s")
    return results


def load_exported(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The exported model as a user gets it: if not told otherwise in fp32 where there is no GPU."""
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return MambaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def file_rows(tokenizer: Tokenizer, texts: Sequence[bytes]) -> list[list[int]]:
    """The tokens of each text between two of end-of-text."""
    encoded = tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
    return [[END_OF_TEXT_ID, *encoding.ids, END_OF_TEXT_ID] for encoding in encoded]


def file_bits(model: Any, tokenizer: Tokenizer, corpus: Path, batch_tokens: int = BATCH_TOKENS) -> dict[str, Any]:
    """Code length in bits of each held-out file from a fresh state, its end included."""
    texts = evaluated_documents(corpus)
    rows = file_rows(tokenizer, texts)
    device = next(model.parameters()).device
    bits = [0.0] * len(rows)
    for batch in batches_by_length([len(row) for row in rows], batch_tokens):
        # causal: what stands right of a row's end changes nothing in it
        longest = max(len(rows[index]) for index in batch)
        padded = [rows[index] + [END_OF_TEXT_ID] * (longest - len(rows[index])) for index in batch]
        losses = token_losses(model, torch.tensor(padded, device=device)).double().cpu()
        for index, row_losses in zip(batch, losses, strict=True):
            bits[index] = row_losses[: len(rows[index]) - 1].sum().item() / math.log(2)
    return {"bits": bits, "bytes": [len(text) for text in texts], "tokens": [len(row) - 2 for row in rows]}


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices grouped so that a group, padded to its longest, has at most ``max_tokens`` (or is one row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def heldout_rows(tokenizer: Tokenizer, corpus: Path, width: int) -> Tensor:
    """All held-out files end to end, end-of-text between them, cut into rows [n, width]; the rest is dropped."""
    documents = Documents(corpus, "heldout")
    texts = documents.take(range(len(documents)))
    stream = [END_OF_TEXT_ID]
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        stream += [*encoding.ids, END_OF_TEXT_ID]
    num_rows = len(stream) // width
    return torch.tensor(stream[: num_rows * width], dtype=torch.int64).view(num_rows, width)


def loss_by_position(model: Any, tokenizer: Tokenizer, settings: EvaluationSettings) -> dict[str, Any]:
    """Mean held-out loss per bucket of positions in long rows, beside the same tokens with the state reset.

    The reset loss is of the same rows cut into pieces of the training length, each from a zero state.
    """
    length = settings.row_length * settings.long_factor
    rows = heldout_rows(tokenizer, settings.corpus, length + 1)
    if not len(rows):
        return {"rows": 0, "length": length, "train_length": settings.row_length, "buckets": []}
    device = next(model.parameters()).device
    running, reset = [], []
    size = max(1, BATCH_TOKENS // length)
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size].to(device)
        running.append(token_losses(model, part).cpu())
        pieces = part.unfold(1, settings.row_length + 1, settings.row_length).flatten(0, 1)
        reset.append(token_losses(model, pieces).view(len(part), -1).cpu())
    buckets = _bucket_means(torch.cat(running), settings.bucket_tokens)
    reset_buckets = _bucket_means(torch.cat(reset), settings.bucket_tokens)
    return {
        "rows": len(rows),
        "length": length,
        "train_length": settings.row_length,
        "buckets": [
            {"begin": begin, "end": end, "loss": loss, "standard_error": error, "reset_loss": reset_loss}
            for (begin, end, loss, error), (_, _, reset_loss, _) in zip(buckets, reset_buckets, strict=True)
        ],
    }


def _bucket_means(losses: Tensor, bucket_tokens: int) -> list[tuple[int, int, float, float]]:
    """(begin, end, mean, standard error over rows) of each bucket of [rows, positions]."""
    result = []
    for begin in range(0, losses.shape[1], bucket_tokens):
        per_row = losses[:, begin : begin + bucket_tokens].double().mean(1)
        error = per_row.std().item() / math.sqrt(len(per_row)) if len(per_row) > 1 else 0.0
        result.append((begin, min(begin + bucket_tokens, losses.shape[1]), per_row.mean().item(), error))
    return result


def completions(model: Any, tokenizer: Tokenizer) -> list[dict[str, str | None]]:
    """What ``generate()`` writes greedily after each fixed prompt."""
    # prompts, unlike documents, mean the special tokens that they spell
    tokenizer.encode_special_tokens = False
    device = next(model.parameters()).device
    results: list[dict[str, str | None]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt.text).ids], device=device)
        with torch.inference_mode():
            output = model.generate(
                ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids)
            )
        written = output[0, ids.shape[1] :].tolist()
        ended = END_OF_TEXT_ID in written
        text = tokenizer.decode(written, skip_special_tokens=True)
        reason = "end of text" if ended else f"{NEW_TOKENS} tokens"
        results.append({"prefix": prompt.prefix, "suffix": prompt.suffix, "completion": text, "stopped_by": reason})
    tokenizer.encode_special_tokens = True
    return results
