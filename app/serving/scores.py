"""Log-probabilities of a prompt, which may be very long: JSON as soon as they come, not an object per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from app.engine.request import PromptLogprobsEvent, TokenLogprobs
from app.serving.logprobs import PromptScores, finite, token_names, top_object
from app.serving.prepared import PreparedCompletion, PreparedPrompt
from app.serving.tokenizer import Tokenizer


class PromptScorer:
    """Writes the log-probabilities of one prompt, once for all of its choices."""

    __slots__ = ("_echo_name", "_last", "_last_start", "_num_echoed", "_num_listed", "_prompt", "_text_of")

    def __init__(self, prepared: PreparedCompletion, prompt: PreparedPrompt, tokenizer: Tokenizer) -> None:
        self._prompt = prompt
        self._num_echoed = prepared.logprobs if prompt.echo_offsets else None
        self._num_listed = prepared.prompt_logprobs
        self._text_of = tokenizer.id_to_token_text
        self._echo_name = token_names(tokenizer, as_ids=prepared.names_ids)
        self._last_start = 0
        # the first token has none
        self._last = self._write(0, (None,))

    @property
    def first(self) -> PromptScores:
        """The slice of the first token, before any event was taken."""
        return self._last

    def take(self, event: PromptLogprobsEvent) -> PromptScores:
        """The slice of an event; each choice is told of the same."""
        if event.start != self._last_start:
            self._last, self._last_start = self._write(event.start, event.logprobs), event.start
        return self._last

    def _write(self, start: int, logprobs: Sequence[TokenLogprobs | None]) -> PromptScores:
        ids = self._prompt.request.prompt_token_ids[start : start + len(logprobs)]
        listed = b"" if self._num_listed is None else self._list(ids, logprobs, self._num_listed)
        if self._num_echoed is None:
            return PromptScores(prompt_logprobs=listed)
        name, num_top = self._echo_name, self._num_echoed
        return PromptScores(
            _members([name(token_id) for token_id in ids]),
            _members([each and finite(each.logprob) for each in logprobs]),
            _members(
                [
                    each and top_object(token_id, each, num_top, name)
                    for token_id, each in zip(ids, logprobs, strict=True)
                ]
            ),
            _members(list(self._prompt.echo_offsets[start : start + len(logprobs)])),
            listed,
        )

    def _list(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], num_top: int) -> bytes:
        return _members(
            [
                each and self._listed_object(token_id, each, num_top)
                for token_id, each in zip(ids, logprobs, strict=True)
            ]
        )

    def _listed_object(self, token_id: int, logprobs: TokenLogprobs, num_top: int) -> dict[str, Any]:
        """The token itself comes first. The engine tells no rank of a token that is not among the likeliest."""
        ranked = [(other, logprob, rank) for rank, (other, logprob) in enumerate(logprobs.top[:num_top], 1)]
        own_rank = next((rank for other, _, rank in ranked if other == token_id), None)
        told = {token_id: (logprobs.logprob, own_rank)} | {
            other: (logprob, rank) for other, logprob, rank in ranked if other != token_id
        }
        return {
            str(other): {"logprob": finite(logprob), "rank": rank, "decoded_token": self._text_of(other)}
            for other, (logprob, rank) in told.items()
        }


def _members(values: list[Any]) -> bytes:
    return orjson.dumps(values)[1:-1]


def make_scorer(prepared: PreparedCompletion, prompt: PreparedPrompt, tokenizer: Tokenizer) -> PromptScorer | None:
    """None where no log-probabilities of the prompt are told."""
    if not prompt.echo_offsets and prepared.prompt_logprobs is None:
        return None
    return PromptScorer(prepared, prompt, tokenizer)
