"""Log-probabilities of the model's own distribution: before bias, penalties, temperature and filters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from app.engine.request import TokenLogprobs


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Of one token per row, and of the ``num_top`` likeliest: logits [B, V], tokens [B] -> [B, 1 + 2 num_top] float64.

    A row is: the token's log-probability, those of the likeliest in falling order, and their ids. One tensor, so that
    it reaches the host in one copy; doubles hold ids exactly.
    """
    normalizer = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None]) - normalizer
    top = logits.topk(min(num_top, logits.shape[1]))
    return torch.cat([chosen.double(), (top.values - normalizer).double(), top.indices.double()], dim=1)


def to_records(packed: Tensor, nums_top: Sequence[int]) -> Iterator[TokenLogprobs | None]:
    """The rows of ``token_logprobs`` as records, each with its own number of likeliest; None for NaN or Inf."""
    for row, num_top in zip(packed.tolist(), nums_top, strict=True):
        middle = (len(row) + 1) // 2
        ids = map(int, row[middle : middle + num_top])
        yield TokenLogprobs(row[0], tuple(zip(ids, row[1:middle], strict=False))) if math.isfinite(row[0]) else None
