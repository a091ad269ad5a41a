"""Changes to single logits before a draw: logit bias and penalties, for the rows that ask for them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.host import to_device
from app.engine.penalties import PenaltyRows, TokenCounts
from app.engine.request import SamplingParams
from app.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class BiasCells:
    """What is added to single logits: row, token and value of each."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class AdjustedRows:
    """What some rows of a batch ask for; a part that nobody asks for is None and costs nothing."""

    bias: BiasCells | None
    penalties: PenaltyRows | None


def is_adjusted(params: SamplingParams) -> bool:
    """Whether bias or penalties change the logits."""
    return bool(params.logit_bias) or _is_penalised(params)


class Adjuster:
    """Bias and penalties of the rows of one engine; what they have drawn is counted per slot."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._counts = TokenCounts(num_slots, vocab_size, device)

    def forget(self) -> None:
        """Rebuild what is kept per slot from the sequences themselves."""
        self._counts.forget()

    def release(self, slots: Iterable[int]) -> None:
        """Rebuild what is kept of these slots."""
        self._counts.release(slots)

    def prepare(self, rows: Rows[Sequence]) -> AdjustedRows:
        """What these rows, in this order, ask for."""
        return AdjustedRows(self._bias_cells(rows), self._penalty_rows(rows))

    def apply(self, logits: Tensor, adjusted: AdjustedRows) -> None:
        """Change logits [B, V] float32 in place."""
        if adjusted.bias:
            logits[adjusted.bias.rows, adjusted.bias.tokens] += adjusted.bias.values
        if adjusted.penalties:
            self._counts.apply(logits, adjusted.penalties)

    def count(self, tokens: Tensor, adjusted: AdjustedRows) -> None:
        """Take note of the tokens [B] that were drawn."""
        if adjusted.penalties:
            self._counts.add(adjusted.penalties, tokens[adjusted.penalties.rows])

    def _bias_cells(self, sequences: Rows[Sequence]) -> BiasCells | None:
        biased = enumerate(sequence.request.sampling.logit_bias for sequence in sequences)
        cells = [(row, token, value) for row, bias in biased for token, value in bias]
        if not cells:
            return None
        rows, tokens, values = zip(*cells, strict=True)
        index = to_device(array("q", rows + tokens), torch.int64, self._device)
        cell_rows, cell_tokens = index.chunk(2)
        return BiasCells(cell_rows, cell_tokens, to_device(array("f", values), torch.float32, self._device))

    def _penalty_rows(self, sequences: Rows[Sequence]) -> PenaltyRows | None:
        rows = [row for row, sequence in enumerate(sequences) if _is_penalised(sequence.request.sampling)]
        if not rows:
            return None
        penalised = [sequences[row] for row in rows]
        self._counts.begin(penalised)
        params = [sequence.request.sampling for sequence in penalised]
        strengths = array("f", (p.presence_penalty for p in params))
        strengths.extend(p.frequency_penalty for p in params)
        strengths.extend(p.repetition_penalty for p in params)
        slots = (sequence.slot for sequence in penalised)
        index = to_device(array("q", (*rows, *slots)), torch.int64, self._device)
        return PenaltyRows(*index.chunk(2), *to_device(strengths, torch.float32, self._device).view(3, -1, 1))


def _is_penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
