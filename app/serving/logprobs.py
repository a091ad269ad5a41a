"""Log-probabilities as the completions API shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.engine.request import TokenLogprobs
from app.serving.tokenizer import Tokenizer

# JSON has no minus infinity
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One token of a choice. offset: where its text starts in the choice's text. logprobs: None where none exist."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


class PromptScores(NamedTuple):
    """A slice of a prompt's log-probabilities: members of JSON lists, without brackets. The first four are those of an
    echoed prompt, the last one is the field ``prompt_logprobs``; what was not asked for is empty.
    """

    tokens: bytes = b""
    token_logprobs: bytes = b""
    top_logprobs: bytes = b""
    text_offset: bytes = b""
    prompt_logprobs: bytes = b""


# how a token is shown
TokenName = Callable[[int], str]


def token_names(tokenizer: Tokenizer, *, as_ids: bool) -> TokenName:
    """Tokens shown by their text, or as ``token_id:123``."""
    return "token_id:{}".format if as_ids else tokenizer.id_to_token_text


def logprobs_object(entries: Sequence[LogprobEntry], name: TokenName, num_characters: int) -> dict[str, Any]:
    """The parallel lists of the wire. ``num_characters`` is the length of the text that was let out: the offset of a
    token whose text was cut."""
    return {
        "tokens": [name(entry.token_id) for entry in entries],
        "token_logprobs": [entry.logprobs and finite(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": [
            entry.logprobs and top_object(entry.token_id, entry.logprobs, len(entry.logprobs.top), name)
            for entry in entries
        ],
        "text_offset": [min(entry.offset, num_characters) for entry in entries],
    }


def top_object(token_id: int, logprobs: TokenLogprobs, num_top: int, name: TokenName) -> dict[str, float]:
    """The ``num_top`` likeliest tokens and the one that stands there; of several that look alike the likeliest."""
    top: dict[str, float] = {}
    for other_id, logprob in (*logprobs.top[:num_top], (token_id, logprobs.logprob)):
        top.setdefault(name(other_id), finite(logprob))
    return top


def finite(logprob: float) -> float:
    """A log-probability that JSON can tell."""
    return max(logprob, LEAST_LOGPROB)
