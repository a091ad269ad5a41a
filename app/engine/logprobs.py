"""Log-probabilities of the model's own distribution: before bias, penalties, temperature and filters."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.host import to_device
from app.engine.request import TokenLogprobs
from app.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Rows whose log-probabilities are wanted, on the device and on the host, and how many of the likeliest each."""

    rows: Tensor
    host_rows: tuple[int, ...]
    nums_top: tuple[int, ...]


def logprob_rows(sequences: Rows[Sequence], device: torch.device) -> LogprobRows | None:
    """The rows of a batch that want log-probabilities; None when none does."""
    wanted = [(row, s.request.sampling.logprobs) for row, s in enumerate(sequences)]
    chosen = [(row, num_top) for row, num_top in wanted if num_top is not None]
    if not chosen:
        return None
    rows, nums_top = zip(*chosen, strict=True)
    return LogprobRows(to_device(array("q", rows), torch.int64, device), rows, nums_top)


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Of one token per row, and of the ``num_top`` likeliest: logits [B, V], tokens [B] -> [B, 1 + 2 num_top] float64.

    A row is: the token's log-probability, those of the likeliest in falling order, and their ids. One tensor, so that
    it reaches the host in one copy; doubles hold ids exactly.
    """
    normalizer = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None]) - normalizer
    top = logits.topk(min(num_top, logits.shape[1]))
    return torch.cat([chosen.double(), (top.values - normalizer).double(), top.indices.double()], dim=1)


def to_records(packed: Tensor, nums_top: Rows[int]) -> Iterator[TokenLogprobs | None]:
    """The rows of ``token_logprobs`` as records, each with its own number of likeliest; None for NaN or Inf."""
    for row, num_top in zip(packed.tolist(), nums_top, strict=True):
        middle = (len(row) + 1) // 2
        ids = map(int, row[middle : middle + num_top])
        yield TokenLogprobs(row[0], tuple(zip(ids, row[1:middle], strict=False))) if math.isfinite(row[0]) else None
