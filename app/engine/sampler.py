"""Draws one token per row of a batch, in which every row has its own sampling parameters."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine import distribution
from app.engine.adjustments import AdjustedRows, Adjuster, is_adjusted
from app.engine.host import to_device
from app.engine.logprobs import LogprobRows, logprob_rows, token_logprobs
from app.engine.masks import Mask
from app.engine.request import SamplingParams
from app.engine.sequence import Sequence

# below this, dividing by the temperature says nothing that the maximum does not
GREEDY_TEMPERATURE = 1e-5

# the likeliest tokens that a top_p without a top_k looks at first
_NUM_NUCLEUS_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class FilterRows:
    """Which of the random rows [F] are filtered by top_k and top_p, and how."""

    rows: Tensor
    top_k: Tensor
    top_p: Tensor
    num_candidates: int


@dataclass(frozen=True, slots=True)
class RandomRows:
    """The rows [R] that are drawn at random; ``rows`` is None for all, ``floors`` (log of min_p) for none."""

    rows: Tensor | None
    keys: Tensor
    temperature: Tensor
    floors: Tensor | None
    filters: FilterRows | None


@dataclass(slots=True)
class SamplingBatch:
    """The parameters of a batch as tensors; a part that no row asks for is None and costs nothing.

    ``positions`` [R] are those of the tokens that the random rows draw next, and advance with every draw.
    """

    random: RandomRows | None
    positions: Tensor
    adjusted: AdjustedRows | None
    logprobs: LogprobRows | None


@dataclass(frozen=True, slots=True)
class Draw:
    """Tokens [B] int64, whether each row's logits were finite [B], log-probabilities as in ``token_logprobs``."""

    tokens: Tensor
    is_finite: Tensor
    logprobs: Tensor | None


class Sampler:
    """Turns logits into tokens. A seeded row draws the same tokens whatever the other rows of the batch are."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._adjuster = Adjuster(num_slots, vocab_size, device)

    def forget(self) -> None:
        """Rebuild what is kept per slot from the sequences themselves."""
        self._adjuster.forget()

    def release(self, slots: Iterable[int]) -> None:
        """Rebuild what is kept of these slots."""
        self._adjuster.release(slots)

    def prepare(self, rows: tuple[Sequence, ...], positions: Tensor | None = None) -> SamplingBatch:
        """The parameters of these rows, in this order.

        ``positions`` [B] are those of the tokens to be drawn next; those of the sequences when not given, which is
        right while nothing is in flight.
        """
        temperatures = [sequence.request.sampling.temperature for sequence in rows]
        drawn = [row for row, temperature in enumerate(temperatures) if temperature >= GREEDY_TEMPERATURE]
        random = self._random_rows(rows, drawn) if drawn else None
        if positions is None:
            positions = self._integers(rows[row].position for row in drawn)
        elif random is not None and random.rows is not None:
            positions = positions[random.rows]
        is_plain = not any(is_adjusted(sequence.request.sampling) for sequence in rows)
        return SamplingBatch(
            random,
            positions,
            None if is_plain else self._adjuster.prepare(rows),
            logprob_rows(rows, self._device),
        )

    def draw(self, logits: Tensor, batch: SamplingBatch, mask: Mask | None = None) -> Draw:
        """One token per row of logits [B, V] float32, which are changed in place."""
        is_finite = logits.sum(-1).isfinite()
        raw = logits[batch.logprobs.rows] if batch.logprobs else None
        if batch.adjusted:
            self._adjuster.apply(logits, batch.adjusted)
        if mask:
            mask.apply(logits)
        tokens = self._choose(logits, batch)
        if batch.adjusted:
            self._adjuster.count(tokens, batch.adjusted)
        logprobs = None
        if batch.logprobs and raw is not None:
            logprobs = token_logprobs(raw, tokens[batch.logprobs.rows], max(batch.logprobs.nums_top))
        return Draw(tokens, is_finite, logprobs)

    def _choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        random = batch.random
        if random is None:
            return logits.argmax(-1)
        if random.rows is None:
            tokens = _draw_random(logits, random, batch.positions)
        else:
            tokens = logits.argmax(-1)
            tokens[random.rows] = _draw_random(logits[random.rows], random, batch.positions)
        batch.positions += 1
        return tokens

    def _random_rows(self, rows: tuple[Sequence, ...], drawn: list[int]) -> RandomRows:
        params = [rows[row].request.sampling for row in drawn]
        keys = (distribution.stream_key(rows[row].request.sampling.seed, rows[row].sample) for row in drawn)
        return RandomRows(
            None if len(drawn) == len(rows) else self._integers(drawn),
            self._integers(keys),
            self._floats(p.temperature for p in params)[:, None],
            self._floats(p.min_p for p in params).log() if any(p.min_p > 0 for p in params) else None,
            self._filter_rows(params),
        )

    def _filter_rows(self, params: list[SamplingParams]) -> FilterRows | None:
        rows = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
        if not rows:
            return None
        top_k = [min(params[row].top_k, self._vocab_size) for row in rows]
        num_candidates = max(top_k) if min(top_k) > 0 else max(*top_k, _NUM_NUCLEUS_CANDIDATES)
        top_p = self._floats(params[row].top_p for row in rows)
        return FilterRows(self._integers(rows), self._integers(top_k), top_p, num_candidates)

    def _integers(self, values: Iterable[int]) -> Tensor:
        return to_device(array("q", values), torch.int64, self._device)

    def _floats(self, values: Iterable[float]) -> Tensor:
        return to_device(array("f", values), torch.float32, self._device)


def _draw_random(logits: Tensor, random: RandomRows, positions: Tensor) -> Tensor:
    scaled = logits.sub_(logits.amax(-1, keepdim=True)).div_(random.temperature)  # [R, V]
    weights = scaled.exp()
    thresholds = random.floors
    if random.filters:
        thresholds = _raise_thresholds(thresholds, scaled, weights, random.filters)
    if thresholds is not None:
        weights.masked_fill_(scaled < thresholds[:, None], 0)
    return distribution.invert(weights, distribution.uniforms(random.keys, positions))


def _raise_thresholds(floors: Tensor | None, scaled: Tensor, weights: Tensor, filters: FilterRows) -> Tensor:
    """The thresholds [R] of min_p and of the other two filters together."""
    rows = filters.rows
    kept = distribution.filter_thresholds(
        scaled[rows], weights[rows], filters.top_k, filters.top_p, filters.num_candidates
    )
    thresholds = floors.clone() if floors is not None else scaled.new_full(scaled.shape[:1], -torch.inf)
    thresholds[rows] = torch.maximum(thresholds[rows], kept)
    return thresholds
