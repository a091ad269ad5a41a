"""How often each running sequence has used each token, kept on the device for rows that ask for penalties."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.host import to_device
from app.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """The rows [P] of a batch that are penalised, their slots [P], and the strengths, each [P, 1] float32."""

    rows: Tensor
    slots: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor


class TokenCounts:
    """Per slot and token: the number of times it was drawn, and whether the prompt holds it.

    Allocated when the first penalised sequence comes; nobody else pays for it.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (num_slots, vocab_size)
        self._device = device
        self._output: Tensor | None = None
        self._prompt: Tensor | None = None
        self._owners: dict[int, Sequence] = {}

    def forget(self) -> None:
        """Count every sequence anew when it comes next."""
        self._owners.clear()

    def release(self, slots: Iterable[int]) -> None:
        """Count anew what comes next on these slots."""
        for slot in slots:
            self._owners.pop(slot, None)

    def begin(self, sequences: Iterable[Sequence]) -> None:
        """Count the tokens of sequences that are not known yet; called whenever a batch is put together."""
        new = [sequence for sequence in sequences if self._owners.get(sequence.slot) is not sequence]
        if not new:
            return
        output, prompt = self._tables()
        slots = to_device(array("q", (sequence.slot for sequence in new)), torch.int64, self._device)
        output.index_fill_(0, slots, 0)
        prompt.index_fill_(0, slots, 0)
        prompt_cells = self._cells((sequence.slot, sequence.request.prompt_token_ids) for sequence in new)
        prompt.view(-1).index_fill_(0, prompt_cells, 1)
        output_cells = self._cells((sequence.slot, sequence.output) for sequence in new)
        output.view(-1).index_add_(0, output_cells, torch.ones_like(output_cells, dtype=output.dtype))
        self._owners.update((sequence.slot, sequence) for sequence in new)

    def add(self, penalised: PenaltyRows, tokens: Tensor) -> None:
        """Count one more token [P] for each penalised row."""
        output, _ = self._tables()
        output[penalised.slots, tokens] += 1

    def apply(self, logits: Tensor, penalised: PenaltyRows) -> None:
        """Change logits [B, V] in place. Repetition looks at prompt and output, the other two at the output alone."""
        output, prompt = self._tables()
        counts = output[penalised.slots]  # [P, V]
        seen = prompt[penalised.slots] | (counts > 0)
        x = logits[penalised.rows]
        repeated = torch.where(x > 0, x / penalised.repetition, x * penalised.repetition)
        x = torch.where(seen, repeated, x)
        x -= penalised.frequency * counts
        x -= penalised.presence * (counts > 0)
        logits[penalised.rows] = x

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._output is None or self._prompt is None:
            self._prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._output = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        return self._output, self._prompt

    def _cells(self, tokens_of_slots: Iterable[tuple[int, Iterable[int]]]) -> Tensor:
        vocab_size = self._shape[1]
        cells = (slot * vocab_size + token for slot, tokens in tokens_of_slots for token in tokens)
        return to_device(array("q", cells), torch.int64, self._device)
