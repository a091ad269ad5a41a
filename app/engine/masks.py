"""Constraints of the rows of a batch, as masks that the device applies.

A step is launched before the tokens of the one before are known on the host. Rows without constraints never wait for
them; for those with, the masks of a step are made while the device runs its forward pass.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from app.engine.forced import STEPS_PER_CHUNK, take_forced
from app.engine.host import Mark, to_device
from app.engine.matchers import num_words
from app.engine.sequence import Constraint, Forced, RowEnd, Sequence

# finite, since a row with an infinite logit counts as broken; its weight is 0 at every temperature
FORBIDDEN = -1e30

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Mask:
    """Bits of the tokens that some rows may draw: rows [M] int64, words [M, W] int32, the lowest bit for token 0."""

    rows: Tensor
    words: Tensor
    shifts: Tensor

    def apply(self, logits: Tensor) -> None:
        """Lower the forbidden ones among logits [B, V] float32, in place."""
        is_allowed = (self.words[:, :, None] >> self.shifts & 1).bool().flatten(1)[:, : logits.shape[1]]
        logits[self.rows] = torch.where(is_allowed, logits[self.rows], FORBIDDEN)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What constraints say of a step: what its rows may draw; by row, those that end instead of drawing; likewise those
    whose tokens are certain, which come back as new ones.
    """

    mask: Mask | None = None
    ends: dict[int, RowEnd] = field(default_factory=dict)
    forced: dict[int, Forced] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Masked:
    """A row of the batch with a constraint."""

    row: int
    sequence: Sequence
    constraint: Constraint


class Masker:
    """Makes the masks of one step after the other, each with what the step before has drawn."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._num_words = num_words(vocab_size)
        self._shifts = torch.arange(_WORD_BITS, dtype=torch.int32, device=device)
        self._num_rows = 0
        self._masked: list[_Masked] = []
        self._forced: dict[int, Forced] = {}
        self._places = torch.empty(0, dtype=torch.int64, device=device)
        self._drawn: tuple[list[_Masked], Tensor, Mark] | None = None
        # a constraint has come to its end since the rows were seated
        self.is_stale = False

    def forget(self) -> None:
        """Drop what is known of steps in flight; constraints are set back when their rows come again."""
        self._masked = []
        self._drawn = None
        self.is_stale = False

    def admit(self, new: Collection[Sequence]) -> None:
        """These sequences come, or come back: their constraints stand behind what the host knows."""
        for sequence in new:
            if sequence.constraint is not None:
                sequence.constraint.restart(sequence.output)
        if new and self._drawn is not None:
            masked, tokens, sent = self._drawn
            self._drawn = [one for one in masked if one.sequence not in new], tokens, sent

    def seat(self, rows: Rows[Sequence], places: dict[int, int] | None = None) -> None:
        """These rows take the steps to come. ``places``: where the logits of a row are, if not at its number."""
        self.is_stale = False
        self._num_rows = len(rows)
        self._masked = [
            _Masked(row, sequence, sequence.constraint)
            for row, sequence in enumerate(rows)
            if sequence.constraint is not None and not sequence.constraint.is_over
        ]
        if self._masked:
            numbers = (masked.row if places is None else places[masked.row] for masked in self._masked)
            self._places = to_device(array("q", numbers), torch.int64, self._device)

    def make(self) -> Verdict:
        """Of the step that is under way."""
        if self._drawn is not None:
            self._catch_up(*self._drawn)
            self._drawn = None
        if not self._masked:
            return Verdict()
        words = np.empty((len(self._masked), self._num_words), dtype=np.int32)
        ends: dict[int, RowEnd] = {}
        for masked, row_words in zip(self._masked, words, strict=True):
            end = masked.constraint.write(row_words)
            if end is not None:
                ends[masked.row] = end
        undecided = ((one.row, one.constraint) for one in self._masked if one.row not in ends)
        self._forced = take_forced(undecided, self._num_rows, STEPS_PER_CHUNK[self._device.type])
        return Verdict(Mask(self._places, self._to_device(words), self._shifts), ends, self._forced)

    def follow(self, tokens: Tensor, sent: Mark) -> None:
        """Take note of the tokens [B] that the step draws, on the host behind that mark."""
        if self._masked:
            followed = [one for one in self._masked if one.row not in self._forced] if self._forced else self._masked
            self._drawn = (followed, tokens, sent)

    def _catch_up(self, masked: list[_Masked], tokens: Tensor, sent: Mark) -> None:
        sent.wait()
        for one in masked:
            # what an ended sample draws is ignored
            if not one.sequence.is_finished:
                one.constraint.accept(int(tokens[one.row]))
                self.is_stale |= one.constraint.is_over

    def _to_device(self, words: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
        host = torch.from_numpy(words)
        if self._device.type != "cuda":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)
