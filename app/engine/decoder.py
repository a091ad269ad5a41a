"""One token for every row: the part of a step that repeats, and what it keeps on the device in between."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from app.engine.host import Mark, mark, to_device, to_host
from app.engine.logprobs import LogprobRows, to_records
from app.engine.masks import Masker
from app.engine.request import TokenLogprobs
from app.engine.sampler import Sampler, SamplingBatch
from app.engine.sequence import Chunk, Forced, RowEnd, Sequence
from mamba_core.cache import MambaCache
from mamba_core.ops import Packing

# what the host reads in place of the token of a row that was not finite; never an index
BROKEN = -1


class Forward(Protocol):
    """What takes tokens through a model."""

    def forward_packed(
        self, input_ids: Tensor, packing: Packing, cache: MambaCache, wanted: Tensor | None = None
    ) -> Tensor:
        """input_ids [T] int64 -> hidden [T, H], continuing from the packing's slots of the cache and updating them.

        Or of the tokens at ``wanted`` [W] int64 alone, [W, H].
        """


class Model(Forward, Protocol):
    """What the engine asks of a model; ``MambaForCausalLM`` is one."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> logits [T, V] float32, which the caller may change."""


def ends_of(bounds: Tensor) -> Tensor:
    """Where the last token of each chunk is, [B], given where chunks begin and end, [B + 1] int64; 0 of no tokens."""
    return (bounds[1:] - 1).clamp_(min=0)


@dataclass(frozen=True, slots=True)
class PendingRows:
    """What a step draws, on its way to the host: tokens [B] with BROKEN where the logits were not finite, behind the
    mark ``sent``, and log-probabilities as in ``token_logprobs`` of the rows that want some. ``ends`` by row, for those
    that end instead, and ``forced`` for those whose tokens are known already.
    """

    tokens: Tensor
    sent: Mark
    logprobs: Tensor | None = None
    wanted: LogprobRows | None = None
    ends: dict[int, RowEnd] = field(default_factory=dict)
    forced: dict[int, Forced] = field(default_factory=dict)

    def read_tokens(self) -> tuple[list[int], frozenset[int]]:
        """The tokens, and the rows that are broken."""
        self.sent.wait()
        tokens: list[int] = self.tokens.tolist()
        if min(tokens) != BROKEN:
            return tokens, frozenset()
        return tokens, frozenset(row for row, token in enumerate(tokens) if token == BROKEN)

    def read_logprobs(self) -> dict[int, TokenLogprobs]:
        """By row."""
        if self.logprobs is None or self.wanted is None:
            return {}
        records = to_records(self.logprobs, self.wanted.nums_top)
        return {row: record for row, record in zip(self.wanted.host_rows, records, strict=True) if record}


class Decoder(Protocol):
    """Draws the next token of rows whose states, and last tokens, are on the device."""

    takes_missing: bool

    def launch(
        self, rows: tuple[Sequence, ...], missing: tuple[Chunk, ...] = (), hidden: Tensor | None = None
    ) -> PendingRows:
        """Start a step of at least one row. What it returns can be read once the device has done the step.

        hidden: [B, H] behind the last tokens of the rows, all of them new, if the model has taken these already.

        The states of some rows lack tokens: the decoder ``takes_missing`` ones, or has others do so first.

        Rows may come and go from call to call. What the host knows of a row, its last token above all, is looked at
        when it comes, and not again until ``forget`` or until tokens of it were forced. Then its sequence has them, and
        its state all but the last, before it is among the rows of a step again.
        """

    def start(self) -> None:
        """Get ready for the first steps; the scratch slot is written to."""

    def forget(self) -> None:
        """Look at every row anew when it comes next."""

    def prepare_more(self) -> bool:
        """Use an idle moment to get ready for steps to come; whether anything was left to do."""


class Seats:
    """Who holds which slot on the device, as of the last step."""

    def __init__(self) -> None:
        self._owners: dict[int, Sequence] = {}

    def clear(self) -> None:
        self._owners = {}

    def take(self, rows: tuple[Sequence, ...]) -> list[Sequence]:
        """These rows sit now, all others have left; returns those that are new."""
        owners = self._owners
        new = [sequence for sequence in rows if owners.get(sequence.slot) is not sequence]
        self._owners = {sequence.slot: sequence for sequence in rows}
        return new

    def release(self, slots: Iterable[int]) -> None:
        """Whoever holds these is new the next time."""
        for slot in slots:
            del self._owners[slot]


@dataclass(frozen=True, slots=True)
class _Batch:
    rows: tuple[Sequence, ...]
    slots: Tensor
    packing: Packing
    sampling: SamplingBatch


class EagerDecoder:
    """Launches one operation after the other; runs on every device, at the pace of the host."""

    takes_missing = True

    def __init__(self, model: Model, cache: MambaCache, vocab_size: int) -> None:
        self._model = model
        self._cache = cache
        self._device = cache.device
        self._sampler = Sampler(cache.num_slots, vocab_size, cache.device)
        self._masker = Masker(vocab_size, cache.device)
        self._seats = Seats()
        self._last_token = torch.zeros(cache.num_slots, dtype=torch.int64, device=cache.device)
        self._positions = torch.zeros_like(self._last_token)
        self._batch: _Batch | None = None

    def launch(
        self, rows: tuple[Sequence, ...], missing: tuple[Chunk, ...] = (), hidden: Tensor | None = None
    ) -> PendingRows:
        batch = self._batch_of(rows)
        if missing:
            hidden = self._catch_up(batch, missing)
        elif hidden is None:
            hidden = self._model.forward_packed(self._last_token[batch.slots], batch.packing, self._cache)  # [B, H]
        logits = self._model.compute_logits(hidden)
        verdict = self._masker.make()
        draw = self._sampler.draw(logits, batch.sampling, verdict.mask)
        self._last_token[batch.slots] = draw.tokens
        self._positions[batch.slots] += 1
        tokens = to_host(torch.where(draw.is_finite, draw.tokens, BROKEN))
        logprobs = None if draw.logprobs is None else to_host(draw.logprobs)
        sent = mark(self._device)
        self._masker.follow(tokens, sent)
        if verdict.forced:
            self._release([rows[row].slot for row in verdict.forced])
        return PendingRows(tokens, sent, logprobs, batch.sampling.logprobs, verdict.ends, verdict.forced)

    def start(self) -> None:
        pass

    def forget(self) -> None:
        self._batch = None
        self._seats.clear()
        self._sampler.forget()
        self._masker.forget()

    def prepare_more(self) -> bool:
        return False

    def _catch_up(self, batch: _Batch, missing: tuple[Chunk, ...]) -> Tensor:
        """Hidden states [B, H] behind the last tokens, before which some rows take others."""
        before = {chunk.prefill.slot: chunk.prefill.tokens[chunk.start : chunk.end] for chunk in missing}
        tokens, ends = array("q"), array("q")
        for sequence in batch.rows:
            tokens.extend(before.get(sequence.slot, ()))
            ends.append(len(tokens))
            tokens.append(0)
        packed = to_device(tokens + ends, torch.int64, self._device)
        ids, last = packed[: len(tokens)].clone(), packed[len(tokens) :]
        ids[last] = self._last_token[batch.slots]
        lengths = [end - begin for begin, end in pairwise((-1, *ends))]
        # what the other rows draw is the same as without these tokens
        packing = Packing.from_lengths(lengths, batch.slots, in_steps=True)
        return self._model.forward_packed(ids, packing, self._cache, last)

    def _release(self, slots: list[int]) -> None:
        self._seats.release(slots)
        self._sampler.release(slots)
        self._batch = None

    def _batch_of(self, rows: tuple[Sequence, ...]) -> _Batch:
        if self._batch is None or self._batch.rows is not rows or self._masker.is_stale:
            new = self._seats.take(rows)
            self._masker.admit(new)
            self._masker.seat(rows)
            numbers = array("q", (sequence.slot for sequence in rows))
            for sequence in new:
                numbers.extend((sequence.slot, sequence.next_token, sequence.position))
            packed = to_device(numbers, torch.int64, self._device)
            slots, (new_slots, tokens, positions) = packed[: len(rows)], packed[len(rows) :].view(-1, 3).unbind(1)
            self._last_token[new_slots] = tokens
            self._positions[new_slots] = positions
            sampling = self._sampler.prepare(rows, self._positions[slots])
            self._batch = _Batch(rows, slots, Packing.step(slots), sampling)
        return self._batch
