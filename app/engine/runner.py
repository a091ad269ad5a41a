"""Sequences to tensors and back: runs planned steps on the device. Nobody else touches the device."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from app.engine.chunks import PackedChunks, chunks_of_rows, pack, ways_of
from app.engine.decoder import Decoder, EagerDecoder, Model, PendingRows, ends_of
from app.engine.host import Mark, mark, to_device, to_host
from app.engine.logprobs import to_records, token_logprobs
from app.engine.request import TokenLogprobs
from app.engine.sequence import Chunk, Forced, StepPlan, StepResult
from app.engine.states import States
from mamba_core.cache import MambaCache
from mamba_core.ops import Packing

# prompt positions whose logits exist at the same time
LOGPROB_SLICE = 256


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """Log-probabilities of the prompt tokens of one chunk, on their way to the host, slice by slice."""

    slices: list[Tensor]
    num_top: int

    def read(self) -> tuple[TokenLogprobs, ...] | None:
        """None where they are NaN or Inf."""
        records: list[TokenLogprobs] = []
        for packed in self.slices:
            for record in to_records(packed, [self.num_top] * len(packed)):
                if record is None:
                    return None
                records.append(record)
        return tuple(records)


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that has been launched. ``marks``: before everything, before the rows, behind everything; only the last
    where it does not matter how long the others are apart.
    """

    prompts: dict[int, PendingPrompt]
    rows: PendingRows | None
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """Log-probabilities of prompts by chunk; ``hidden`` [B, H] behind the last tokens of all rows of the step, if these
    went along with the chunks; whether how long it takes tells of steps to come.
    """

    prompts: dict[int, PendingPrompt] = field(default_factory=dict)
    hidden: Tensor | None = None
    is_typical: bool = True


class QuickPrefill(Protocol):
    """A quicker way for some chunks; see ``chunk_graphs.ChunkGraphs``."""

    @property
    def can_run(self) -> bool:
        """Whether there are, or may still be, chunks that it takes."""

    def run(self, chunks: PackedChunks) -> Tensor | None:
        """Take chunks through the model; the hidden states of the last token of each, [B, H] or more, until the next
        run. None, and nothing done, if they are not among those that it takes.
        """

    def prepare_more(self) -> bool:
        """Use an idle moment; whether there was anything to prepare."""


class Runner:
    """One model, its state cache and a decoder, by default the one that needs nothing but torch.

    is_uniform: tokens go the way of their request, see ``chunks.ways_of``, so that it comes to the same whatever runs
    beside it, if the kernels see to the rest. The decoder has to take missing tokens. Otherwise the quickest way.
    """

    def __init__(
        self,
        model: Model,
        cache: MambaCache,
        vocab_size: int,
        decoder: Decoder | None = None,
        quick_prefill: QuickPrefill | None = None,
        *,
        states: States | None = None,
        is_uniform: bool = False,
    ) -> None:
        self._model = model
        self._cache = cache
        self._states = states or States(cache)
        self._device = cache.device
        self._decoder: Decoder = decoder or EagerDecoder(model, cache, vocab_size)
        self._quick_prefill = quick_prefill
        self._is_uniform = is_uniform

    @property
    def cache(self) -> MambaCache:
        return self._cache

    @property
    def is_asynchronous(self) -> bool:
        """Whether steps go on after ``launch`` has returned."""
        return self._device.type == "cuda"

    @torch.inference_mode()
    def start(self) -> None:
        """Get ready for the first steps."""
        self._states.start()
        self._decoder.start()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step. If it raises, the states of all slots are suspect: ``forget``, and compute them again."""
        marks = [mark(self._device)] if plan.chunks else []
        if plan.fresh:
            self._states.zero(plan.fresh)
        self._states.settle(chunk.prefill.slot for chunk in (*plan.chunks, *plan.missing))
        if self._is_uniform:
            prefilled, missing = self._prefill_uniformly(plan)
        else:
            missing = plan.missing
            chunks = plan.chunks if self._decoder.takes_missing else plan.chunks + missing
            prefilled = self._prefill(chunks, chunks_of_rows(plan, chunks)) if chunks else _Prefilled()
        if not prefilled.is_typical:
            marks.clear()
        if plan.forks:
            self._states.copy(plan.forks)
        if marks:
            marks.append(mark(self._device))
        rows = self._decoder.launch(plan.rows, missing, prefilled.hidden) if plan.rows else None
        return PendingStep(prefilled.prompts, rows, (*marks, mark(self._device)))

    @staticmethod
    def forced(pending: PendingStep) -> dict[int, Forced]:
        """By row, tokens that are known before the step is done."""
        return pending.rows.forced if pending.rows else {}

    def collect(self, pending: PendingStep) -> StepResult:
        """Wait for a step and read what it drew. If it raises, all states are suspect as well."""
        marks = pending.marks
        marks[-1].wait()
        tokens, broken = pending.rows.read_tokens() if pending.rows else ([], frozenset[int]())
        logprobs = pending.rows.read_logprobs() if pending.rows else {}
        prompts = {index: prompt.read() for index, prompt in pending.prompts.items()}
        seconds = [later.seconds_since(earlier) for earlier, later in zip(marks, marks[1:], strict=False)]
        ends = pending.rows.ends if pending.rows else {}
        prefill_seconds, decode_seconds = seconds or (0.0, 0.0)
        forced = self.forced(pending)
        return StepResult(tokens, broken, logprobs, prompts, prefill_seconds, decode_seconds, ends, forced)

    def forget(self) -> None:
        """Drop everything that is kept between steps, apart from the states in the cache."""
        self._decoder.forget()

    def probe(self) -> None:
        """Raise what the device raises when it no longer works at all."""
        torch.zeros(1, device=self._device).item()

    @torch.inference_mode()
    def prepare_more(self) -> bool:
        """Use an idle moment to get ready for steps to come; whether anything was left to do."""
        # a decoder has what it needs most since its start
        return (self._quick_prefill is not None and self._quick_prefill.prepare_more()) or self._decoder.prepare_more()

    def _prefill_uniformly(self, plan: StepPlan) -> tuple[_Prefilled, tuple[Chunk, ...]]:
        """Take chunks through the model; returns those as well that are left to the decoder."""
        if not plan.chunks and not plan.missing:
            return _Prefilled(), ()
        ways = ways_of(plan)
        prompts: dict[int, PendingPrompt] = {}
        if ways.by_scan:
            found = self._prefill(tuple(ways.by_scan.values()), []).prompts
            indices = tuple(ways.by_scan)
            prompts = {indices[place]: prompt for place, prompt in found.items()}
        for chunks in ways.in_steps:
            self._forward(pack(tuple(chunks)), ends_alone=True, in_steps=True)
        # what goes with the rows takes no time of its own
        return _Prefilled(prompts, is_typical=ways.with_rows == plan.missing), ways.with_rows

    def _prefill(self, chunks: tuple[Chunk, ...], rows: list[int]) -> _Prefilled:
        """Take chunks through the model, and with them the last tokens of ``rows``, given as by ``chunks_of_rows``."""
        is_typical = self._quick_prefill is None or not self._quick_prefill.can_run
        if any(chunk.wants_logprobs for chunk in chunks):
            return _Prefilled(self._prefill_with_logprobs(chunks), is_typical=is_typical)
        packed = pack(chunks, rows)
        hidden = self._prefill_quickly(packed)
        if hidden is not None:
            is_typical = True
        elif rows and self._prefill_quickly(pack(chunks)) is not None:
            # there is room for all but those last tokens
            return _Prefilled()
        else:
            hidden = self._forward(packed, ends_alone=True)
        if not rows:
            return _Prefilled(is_typical=is_typical)
        order = to_device(array("q", rows), torch.int64, self._device)
        return _Prefilled(hidden=hidden.index_select(0, order), is_typical=False)

    def _prefill_quickly(self, chunks: PackedChunks) -> Tensor | None:
        return None if self._quick_prefill is None else self._quick_prefill.run(chunks)

    def _prefill_with_logprobs(self, chunks: tuple[Chunk, ...]) -> dict[int, PendingPrompt]:
        packed = pack(chunks)
        hidden = self._forward(packed, ends_alone=False)
        wanted = [index for index, chunk in enumerate(chunks) if chunk.wants_logprobs]
        return {index: self._prompt_logprobs(hidden, chunks[index], packed.bounds[index]) for index in wanted}

    def _forward(self, chunks: PackedChunks, *, ends_alone: bool, in_steps: bool = False) -> Tensor:
        """Hidden states of all tokens [T, H], or of the last token of each chunk [B, H]."""
        tokens, slots = chunks.tokens, chunks.slots
        packed = to_device(tokens + slots + chunks.bounds, torch.int64, self._device)
        ids, slot_ids, bounds = packed.tensor_split((len(tokens), len(tokens) + len(slots)))
        # a token alone would be a step
        longest = max(2, chunks.longest) if self._is_uniform else chunks.longest
        packing = Packing(slot_ids, bounds.to(torch.int32), len(tokens), longest, in_steps)
        return self._model.forward_packed(ids, packing, self._cache, ends_of(bounds) if ends_alone else None)

    def _prompt_logprobs(self, hidden: Tensor, chunk: Chunk, offset: int) -> PendingPrompt:
        """Log-probabilities of the tokens that follow those of a chunk, whose hidden states begin at ``offset``."""
        prefill = chunk.prefill
        slices: list[Tensor] = []
        num_top = prefill.request.prompt_logprobs or 0
        for start in range(max(chunk.start, prefill.num_reported), chunk.end, LOGPROB_SLICE):
            end = min(start + LOGPROB_SLICE, chunk.end)
            targets = to_device(prefill.tokens[start + 1 : end + 1], torch.int64, self._device)
            first = offset + start - chunk.start
            logits = self._model.compute_logits(hidden[first : first + end - start])  # [slice, V]
            slices.append(to_host(token_logprobs(logits, targets, num_top)))
        return PendingPrompt(slices, num_top)
