"""Sequences to tensors and back: runs one planned step on the device. Nobody else touches the device."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.engine.host import to_device
from app.engine.logprobs import to_records, token_logprobs
from app.engine.request import TokenLogprobs
from app.engine.sampler import Sampler, SamplingBatch
from app.engine.sequence import Chunk, Sequence, StepPlan, StepResult
from mamba_core.cache import MambaCache
from mamba_core.ops import Packing

# prompt positions whose logits exist at the same time
LOGPROB_SLICE = 256

# what the host reads in place of the token of a row that was not finite; never an index
_BROKEN = -1


class Model(Protocol):
    """What the runner asks of a model; ``MambaForCausalLM`` is one."""

    def forward_packed(self, input_ids: Tensor, packing: Packing, cache: MambaCache) -> Tensor:
        """input_ids [T] int64 -> hidden [T, H], continuing from the packing's slots of the cache and updating them."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> logits [T, V] float32, which the caller may change."""


@dataclass(slots=True)
class _Batch:
    """The rows that decode together, as tensors. ``tokens`` [B] are fed next and stay on the device between steps."""

    rows: tuple[Sequence, ...]
    tokens: Tensor
    packing: Packing
    sampling: SamplingBatch


class Runner:
    """One model, its state cache and a sampler."""

    def __init__(self, model: Model, cache: MambaCache, vocab_size: int) -> None:
        self._model = model
        self._cache = cache
        self._device = cache.device
        self._sampler = Sampler(cache.num_slots, vocab_size, cache.device)
        self._batch: _Batch | None = None

    @property
    def cache(self) -> MambaCache:
        return self._cache

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. If it raises, the states of all slots are suspect: call ``forget`` and compute them again."""
        if plan.fresh:
            self._cache.zero(plan.fresh)
        prompt_logprobs = self._prefill(plan.chunks) if plan.chunks else {}
        if plan.forks:
            self._cache.copy(*map(list, zip(*plan.forks, strict=True)))
        return self._decode(plan.rows, prompt_logprobs)

    def forget(self) -> None:
        """Drop everything that is kept between steps, apart from the states in the cache."""
        self._batch = None
        self._sampler.forget()

    def probe(self) -> None:
        """Raise what the device raises when it no longer works at all."""
        torch.zeros(1, device=self._device).item()

    def _prefill(self, chunks: tuple[Chunk, ...]) -> dict[int, tuple[TokenLogprobs, ...] | None]:
        numbers, lengths = array("q"), [chunk.end - chunk.start for chunk in chunks]
        for chunk in chunks:
            numbers += chunk.prefill.tokens[chunk.start : chunk.end]
        num_tokens = len(numbers)
        numbers.extend(chunk.prefill.slot for chunk in chunks)
        offsets = array("q", [0])
        for length in lengths:
            offsets.append(offsets[-1] + length)
        packed = to_device(numbers + offsets, torch.int64, self._device)
        tokens, slots, cu_seqlens = packed.tensor_split((num_tokens, len(numbers)))
        packing = Packing(slots, cu_seqlens.to(torch.int32), num_tokens, max(lengths))
        hidden = self._model.forward_packed(tokens, packing, self._cache)  # [T, H]
        wanted = [index for index, chunk in enumerate(chunks) if chunk.wants_logprobs]
        return {index: self._prompt_logprobs(hidden, chunks[index], offsets[index]) for index in wanted}

    def _prompt_logprobs(self, hidden: Tensor, chunk: Chunk, offset: int) -> tuple[TokenLogprobs, ...] | None:
        """Log-probabilities of the tokens that follow those of a chunk, whose hidden states begin at ``offset``."""
        prefill = chunk.prefill
        records: list[TokenLogprobs] = []
        num_top = prefill.request.prompt_logprobs or 0
        for start in range(max(chunk.start, prefill.num_reported), chunk.end, LOGPROB_SLICE):
            end = min(start + LOGPROB_SLICE, chunk.end)
            targets = to_device(prefill.tokens[start + 1 : end + 1], torch.int64, self._device)
            first = offset + start - chunk.start
            logits = self._model.compute_logits(hidden[first : first + end - start])  # [slice, V]
            for record in to_records(token_logprobs(logits, targets, num_top), [num_top] * (end - start)):
                if record is None:
                    return None
                records.append(record)
        return tuple(records)

    def _decode(
        self, rows: tuple[Sequence, ...], prompt_logprobs: dict[int, tuple[TokenLogprobs, ...] | None]
    ) -> StepResult:
        if not rows:
            return StepResult([], prompt_logprobs=prompt_logprobs)
        batch = self._batch_of(rows)
        hidden = self._model.forward_packed(batch.tokens, batch.packing, self._cache)  # [B, H]
        draw = self._sampler.draw(self._model.compute_logits(hidden), batch.sampling)
        batch.tokens = draw.tokens
        tokens = torch.where(draw.is_finite, draw.tokens, _BROKEN).tolist()
        broken = frozenset[int]()
        if min(tokens) == _BROKEN:
            broken = frozenset(row for row, token in enumerate(tokens) if token == _BROKEN)
        logprobs: dict[int, TokenLogprobs] = {}
        if draw.logprobs is not None and batch.sampling.logprobs is not None:
            wanted = batch.sampling.logprobs
            records = to_records(draw.logprobs, wanted.nums_top)
            logprobs = {row: record for row, record in zip(wanted.host_rows, records, strict=True) if record}
        return StepResult(tokens, broken, logprobs, prompt_logprobs)

    def _batch_of(self, rows: tuple[Sequence, ...]) -> _Batch:
        if self._batch is None or self._batch.rows is not rows:
            numbers = array("q", (sequence.next_token for sequence in rows))
            numbers.extend(sequence.slot for sequence in rows)
            tokens, slots = to_device(numbers, torch.int64, self._device).chunk(2)
            self._batch = _Batch(rows, tokens, Packing.step(slots), self._sampler.prepare(rows))
        return self._batch
