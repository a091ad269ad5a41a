"""What the engine keeps of each sample while it lives, and what one step is told to do and reports back."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from app.engine.request import FinishReason, GenerationRequest, TokenEvent, TokenLogprobs
from app.engine.slots import SCRATCH_SLOT


class Constraint(Protocol):
    """Which tokens may follow in one sample; ``constraints.Constraint`` is one."""

    @property
    def is_over(self) -> bool:
        """Whether no token is to be drawn any more."""

    def restart(self, output: list[int]) -> None:
        """Stand behind this output, whatever came before."""

    def accept(self, token: int) -> None:
        """A token was drawn."""

    def write(self, words: Any) -> RowEnd | None:
        """Fill a row of a mask, an array of int32 with a bit per token; or tell why the row ends instead."""

    @property
    def outlook(self) -> Outlook:
        """What is known, after a ``write``, of the tokens that follow whatever is drawn."""

    def run_ahead(self) -> Forced:
        """Stand behind all tokens that follow whatever is drawn."""

    def opening(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens with which every sample begins, none of which ends it; asked before anything else."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request: the slot of its state and the tokens it has made.

    ``output`` and ``next_token`` are what has come back from the device; while a step is in flight, the device is one
    token ahead. ``next_token`` is the last of the output or, before the first, of the prompt: its effect is not in
    the state, it is what decode feeds. ``prefill`` is set until a step is planned after which the state holds every
    token before it. ``last_plan`` is the number of the plan that draws the last token allowed. ``constraint`` says
    which tokens may follow; it stands where the device does, and is the decoder's to move.
    """

    request: GenerationRequest
    sample: int
    stop_token_ids: frozenset[int]
    next_token: int
    slot: int = SCRATCH_SLOT
    output: list[int] = field(default_factory=list)
    prefill: Prefill | None = None
    is_finished: bool = False
    last_plan: int = 0
    constraint: Constraint | None = None

    @property
    def num_left(self) -> int:
        """Tokens it may still make."""
        return self.request.max_tokens - len(self.output)

    @property
    def position(self) -> int:
        """Index of the token to be drawn next, counted from the start of the prompt."""
        return len(self.request.prompt_token_ids) + len(self.output)

    @property
    def tokens(self) -> array[int]:
        """All tokens so far, prompt and output."""
        return array("q", self.request.prompt_token_ids) + array("q", self.output)

    def accept(self, token: int, logprobs: TokenLogprobs | None = None) -> TokenEvent:
        """Append the token drawn by decode; the event says whether it was the last."""
        self.output.append(token)
        self.next_token = token
        reason, stop_reason = None, None
        if token in self.stop_token_ids:
            reason, stop_reason = FinishReason.STOP, token
        elif len(self.output) >= self.request.max_tokens:
            reason = FinishReason.LENGTH
        return TokenEvent(self.request.request_id, self.sample, token, logprobs, reason, stop_reason)

    def end(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """The event of an end without a token."""
        return TokenEvent(self.request.request_id, self.sample, None, finish_reason=reason, error=error)


@dataclass(slots=True, eq=False)
class Prefill:
    """Tokens that must pass through the model before decode: all but the last of those given.

    The samples of a request share one until it is done. Its state grows in ``slot``, the slot of the first sequence.
    ``num_done`` counts the tokens that planned steps take, ``num_reported`` the prompt positions whose
    log-probabilities have been delivered. ``opening`` are those of the tokens, at their end, that belong to the output
    of every sequence and have not been told yet.
    """

    request: GenerationRequest
    sequences: list[Sequence]
    tokens: array[int]
    num_done: int = 0
    num_reported: int = 0
    opening: tuple[int, ...] = ()

    @property
    def live_sequences(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.is_finished]

    @property
    def slot(self) -> int:
        return self.sequences[0].slot

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill in all; the last token goes through decode, or along with the last chunk."""
        return len(self.tokens) - 1

    @property
    def num_left(self) -> int:
        return self.num_tokens - self.num_done


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``end`` of a prefill, taken into one step."""

    prefill: Prefill
    start: int
    end: int

    @property
    def wants_logprobs(self) -> bool:
        prefill = self.prefill
        return prefill.request.prompt_logprobs is not None and self.end > prefill.num_reported


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. In this order: zero the slots of ``fresh``, run ``chunks``, copy states along ``forks`` (source,
    destination), draw one token for each of ``rows``.

    ``rows`` is the same object as in the step before when nobody came or went. ``done`` are the prefills that this
    step completes. ``missing`` are tokens that the states of some rows lack before they draw, besides the next one.
    ``admitted`` are the requests that have waited until now. A step ``is_solo`` when it leaves out sequences that could
    run.
    """

    fresh: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    forks: tuple[tuple[int, int], ...]
    rows: tuple[Sequence, ...]
    done: tuple[Prefill, ...]
    is_solo: bool = False
    missing: tuple[Chunk, ...] = ()
    admitted: tuple[GenerationRequest, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.rows or self.chunks or self.done or self.fresh)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def num_decode_tokens(self) -> int:
        return len(self.rows) + sum(chunk.end for chunk in self.missing)

    @property
    def members(self) -> tuple[Sequence, ...]:
        """Every sequence that takes part, once."""
        prefills = [chunk.prefill for chunk in self.chunks] + list(self.done)
        prefilling = [sequence for prefill in prefills for sequence in prefill.sequences]
        return tuple(dict.fromkeys([*prefilling, *self.rows]))


@dataclass(frozen=True, slots=True)
class RowEnd:
    """Why a row ends instead of drawing a token."""

    reason: FinishReason
    error: str | None = None


class Outlook(NamedTuple):
    """How many tokens follow whatever is drawn, the one being drawn among them, and whether they end the sample."""

    num_tokens: int
    is_end: bool


@dataclass(frozen=True, slots=True)
class Forced:
    """Tokens that follow whatever a row draws, and the end without a token behind them, if that is certain as well.

    The first of them is the one that the row would have drawn.
    """

    tokens: tuple[int, ...]
    end: RowEnd | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew: one token per row, meaningless for ``broken`` rows, whose logits were not finite, for those
    that have ``ends``, and for ``forced`` ones, whose tokens were told when the step was launched.

    ``logprobs`` by row, for rows that asked; ``prompt_logprobs`` by chunk, in the order of positions, or None where
    they were NaN or Inf. The seconds are those of the device, 0 where they are no measure of steps to come.
    """

    tokens: list[int]
    broken: frozenset[int] = frozenset()
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...] | None] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    ends: dict[int, RowEnd] = field(default_factory=dict)
    forced: Collection[int] = ()
