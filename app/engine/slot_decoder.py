"""Decode without the host: everything a step needs is in tables on the device, addressed by slot."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from app.engine.adjustments import AdjustedRows, Adjuster, is_adjusted
from app.engine.decoder import BROKEN, Model, PendingRows, Seats
from app.engine.distribution import stream_key
from app.engine.graphs import StepBody, StepOutput, nothing, rows_like_first
from app.engine.host import outbox, to_device, to_host
from app.engine.logprobs import LogprobRows, logprob_rows, token_logprobs
from app.engine.masks import Mask, Masker, Verdict
from app.engine.request import SamplingParams
from app.engine.sequence import Chunk, Sequence
from app.engine.states import States
from mamba_core.cache import MambaCache
from mamba_core.ops import Packing


class SamplingTables(Protocol):
    """Sampling parameters by slot; ``fused_sampler.SlotSampling`` is one."""

    positions: Tensor
    last_tokens: Tensor

    def write(
        self,
        slots: Rows[int],
        params: Rows[SamplingParams],
        keys: Rows[int],
        positions: Rows[int],
        last_tokens: Rows[int],
    ) -> None:
        """Set what the draws of these slots depend on, and the tokens before them."""


class DrawTokens(Protocol):
    """Draws from logits; ``fused_sampler.draw_tokens`` is one."""

    def __call__(self, logits: Tensor, slots: Tensor, tables: Any, out: Tensor | None = None) -> Tensor:
        """logits [B, V] float32, slots [B] -> tokens [B] int64, in ``out`` if given, BROKEN in rows that were not
        finite; tokens are the last ones of their slots then, where BROKEN any, and the positions advance by one.
        """


class StepRuns(Protocol):
    """Runs a step body for any number of rows; ``graphs.Steps`` and ``graphs.GraphSteps`` are two ways."""

    def run(self, num_rows: int, before: Callable[[int], None] = nothing) -> StepOutput:
        """One step of the first ``num_rows`` slots; the output may have more rows, of whose number ``before`` is told
        first.
        """

    def start(self) -> None:
        """Get ready for the first steps; slot 0 is written to."""

    def prepare_more(self) -> bool:
        """Use an idle moment; whether there was anything to prepare."""


@dataclass(frozen=True, slots=True)
class _Redraw:
    """Rows that draw from changed logits: their places in the batch [A], their slots [A] and the adjustments."""

    rows: Tensor
    slots: Tensor
    adjusted: AdjustedRows


class SlotDecoder:
    """A step whose only input from the host is the vector of slots, and that only when rows have come or gone.

    ``make_steps`` gets the step as a function of its packing, and the vector of slots, padded with the scratch slot.
    Rows that ask for adjusted logits, for masks or for log-probabilities get them after the step, from its logits; what
    the other rows draw does not depend on them, and the forward pass does not wait for masks.
    """

    # a graph has one token of each row
    takes_missing = False

    def __init__(
        self,
        model: Model,
        cache: MambaCache,
        vocab_size: int,
        tables: SamplingTables,
        draw: DrawTokens,
        make_steps: Callable[[StepBody, Tensor], StepRuns],
        states: States | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._states = states or States(cache)
        self._device = cache.device
        self._tables = tables
        self._draw = draw
        self._adjuster = Adjuster(cache.num_slots, vocab_size, cache.device)
        self._masker = Masker(vocab_size, cache.device)
        self._seats = Seats()
        self._outbox = outbox(cache.device)
        self._slots = torch.zeros(cache.num_slots - 1, dtype=torch.int64, device=cache.device)
        # not memory of graphs, which share theirs
        self._tokens = torch.zeros_like(self._slots)
        self._rows: tuple[Sequence, ...] | None = None
        self._special: set[Sequence] = set()
        self._redraw: _Redraw | None = None
        self._logprobs: LogprobRows | None = None
        self._steps = make_steps(self._step, self._slots)

    def launch(
        self,
        rows: tuple[Sequence, ...],
        missing: tuple[Chunk, ...] = (),  # noqa: ARG002
        hidden: Tensor | None = None,
    ) -> PendingRows:
        if rows is not self._rows or self._masker.is_stale:
            self._seat(rows)
        output = self._steps.run(len(rows), self._before_step) if hidden is None else self._start(hidden)
        verdict = Verdict()
        if self._redraw is not None:
            verdict = self._masker.make()
            self._draw_again(output, self._redraw, verdict.mask)
        logprobs = None
        if (wanted := self._logprobs) is not None:
            drawn = output.tokens[wanted.rows].clamp_(min=0)
            logprobs = to_host(token_logprobs(output.logits[wanted.rows], drawn, max(wanted.nums_top)))
        tokens, sent = self._outbox.send(output.tokens[: len(rows)])
        self._masker.follow(tokens, sent)
        if verdict.forced:
            self._release([rows[row].slot for row in verdict.forced])
        return PendingRows(tokens, sent, logprobs, self._logprobs, verdict.ends, verdict.forced)

    def start(self) -> None:
        self._steps.start()

    def forget(self) -> None:
        self._rows = None
        self._seats.clear()
        self._special.clear()
        self._adjuster.forget()
        self._masker.forget()

    def prepare_more(self) -> bool:
        return self._steps.prepare_more()

    def _before_step(self, num_rows: int) -> None:
        assert self._rows is not None
        self._states.before_step(self._rows, num_rows)

    def _step(self, packing: Packing) -> StepOutput:
        slots = packing.slots
        tokens = self._tables.last_tokens.index_select(0, slots)
        hidden = self._model.forward_packed(tokens, packing, self._cache)  # [B, H]
        return self._draw_from(hidden, slots)

    def _start(self, hidden: Tensor) -> StepOutput:
        """Of rows whose last tokens the model has taken, with as many rows of no sequence as a kernel is made for."""
        num_rows = rows_like_first(len(hidden), len(self._slots))
        padded = hidden.new_zeros(num_rows, hidden.shape[1])
        padded[: len(hidden)] = hidden
        return self._draw_from(padded, self._slots[:num_rows])

    def _draw_from(self, hidden: Tensor, slots: Tensor) -> StepOutput:
        logits = self._model.compute_logits(hidden)  # [B, V]
        # what was drawn in the step before may still be on its way to the host
        self._outbox.wait()
        return StepOutput(logits, self._draw(logits, slots, self._tables, self._tokens[: len(slots)]))

    def _draw_again(self, output: StepOutput, redraw: _Redraw, mask: Mask | None) -> None:
        logits = output.logits.index_select(0, redraw.rows)  # [A, V]
        self._adjuster.apply(logits, redraw.adjusted)
        if mask:
            mask.apply(logits)
        # the step has drawn for these rows already
        self._tables.positions[redraw.slots] -= 1
        tokens = self._draw(logits, redraw.slots, self._tables)
        self._adjuster.count(tokens.clamp(min=0), redraw.adjusted)
        # a mask may cover what is not finite
        is_finite = output.tokens[redraw.rows] != BROKEN
        output.tokens[redraw.rows] = torch.where(is_finite, tokens, BROKEN)

    def _release(self, slots: list[int]) -> None:
        self._seats.release(slots)
        self._adjuster.release(slots)
        self._rows = None

    def _seat(self, rows: tuple[Sequence, ...]) -> None:
        new = self._seats.take(rows)
        numbers = array("q", (sequence.slot for sequence in rows))
        numbers.frombytes(bytes(numbers.itemsize * (len(self._slots) - len(rows))))
        self._slots.copy_(to_device(numbers, torch.int64, self._device))
        if new:
            self._write_tables(new)
        self._masker.admit(new)
        # all rows are looked at only while there is one that asks for more than a token
        self._special = {s for s in self._special if not s.is_finished} | {s for s in new if _is_special(s)}
        self._redraw = None
        if self._special:
            self._redraw = self._find_changed(rows)
        else:
            self._masker.forget()
        self._logprobs = logprob_rows(rows, self._device) if self._special else None
        self._rows = rows

    def _write_tables(self, new: list[Sequence]) -> None:
        params = [sequence.request.sampling for sequence in new]
        keys = [stream_key(p.seed, sequence.sample) for p, sequence in zip(params, new, strict=True)]
        slots, positions = [sequence.slot for sequence in new], [sequence.position for sequence in new]
        self._tables.write(slots, params, keys, positions, [sequence.next_token for sequence in new])

    def _find_changed(self, rows: tuple[Sequence, ...]) -> _Redraw | None:
        chosen = [row for row, sequence in enumerate(rows) if _is_changed(sequence)]
        self._masker.seat(rows, {row: place for place, row in enumerate(chosen)})
        if not chosen:
            return None
        adjusted = self._adjuster.prepare([rows[row] for row in chosen])
        index = to_device(array("q", (*chosen, *(rows[row].slot for row in chosen))), torch.int64, self._device)
        chosen_rows, slots = index.chunk(2)
        return _Redraw(chosen_rows, slots, adjusted)


def _is_special(sequence: Sequence) -> bool:
    return sequence.request.sampling.logprobs is not None or _is_changed(sequence)


def _is_changed(sequence: Sequence) -> bool:
    """Whether tokens are drawn from other logits than the model's."""
    constraint = sequence.constraint
    return is_adjusted(sequence.request.sampling) or (constraint is not None and not constraint.is_over)
