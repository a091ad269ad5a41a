"""Log-probabilities as the completions API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def logprobs_object(entries: Sequence[LogprobEntry], tokenizer: Tokenizer, num_characters: int) -> dict[str, Any]:
    """The parallel lists of the wire. ``num_characters`` is the length of the text that was let out: the offset of a
    token whose text was cut."""
    text_of = tokenizer.id_to_token_text
    return {
        "tokens": [text_of(entry.token_id) for entry in entries],
        "token_logprobs": [entry.logprobs and _finite(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": [_top(entry, tokenizer) for entry in entries],
        "text_offset": [min(entry.offset, num_characters) for entry in entries],
    }


def _top(entry: LogprobEntry, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The likeliest tokens and the drawn one; of several that look alike the likeliest is shown."""
    if entry.logprobs is None:
        return None
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.logprobs.top, (entry.token_id, entry.logprobs.logprob)):
        top.setdefault(tokenizer.id_to_token_text(token_id), _finite(logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
