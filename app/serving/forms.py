"""What an answer looks like on the wire, as far as running a request needs to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from app.serving.errors import RequestError
from app.serving.logprobs import LogprobEntry, PromptScores

# the end of a stream in the frame of its events, for a request that failed or, with None, did not
LastWords = Callable[[tuple[bytes, bytes], RequestError | None], bytes]


@dataclass(frozen=True, slots=True)
class ChoicePart:
    """What came of a choice since it was asked for last, or all of it.

    end: length of the choice's text up to now, in characters. finish_reason: None while the choice goes on.
    prompt_scores: log-probabilities of the prompt. token_ids: of what was generated, None unless asked for.
    prompt_token_ids: beside them, in the first part of a choice.
    """

    index: int
    text: str
    entries: list[LogprobEntry]
    end: int
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_scores: Sequence[PromptScores] = ()
    token_ids: Sequence[int] | None = None
    prompt_token_ids: Sequence[int] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.text or self.entries or self.finish_reason or self.prompt_scores or self.token_ids)


class Encoder(Protocol):
    """Writes one stream. Everything it returns is in its frame, ready to be sent; empty bytes are nothing to send.

    is_plain: whether a chunk in the midst of a choice holds text alone, so that ``chunk`` writes it.
    """

    is_plain: bool

    def chunk(self, index: int, text: str) -> bytes:
        """A piece of text in the midst of a choice: what nearly every chunk is."""

    def full_chunk(self, part: ChoicePart, usage: dict[str, Any] | None) -> bytes:
        """Any other chunk of a choice."""

    def ending(self, usage: dict[str, Any]) -> bytes:
        """What follows the last chunk of the last choice."""


class AnswerForm(Protocol):
    """The answers of one kind of request, of which it knows whatever they need."""

    def encoder(self, frame: tuple[bytes, bytes]) -> Encoder:
        """For a streamed answer, with what stands before and after each event."""

    def answer(self, parts: Sequence[ChoicePart], usage: dict[str, Any]) -> bytes:
        """The whole answer as JSON."""
