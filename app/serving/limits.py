"""What an operator bounds in one request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Bounds of one request; what is beyond them is refused before the engine hears of it.

    max_model_len: most tokens of prompt plus output, None for no limit. max_prompts: prompts in one request.
    max_n: continuations of one prompt. max_prompt_logprobs: log-probabilities of prompt tokens in an answer that is not
    streamed, over all prompts, alternatives and choices, since it is kept in memory as JSON until it is whole.
    max_waiting_bytes: the same of a stream, as JSON that waits for a client to read.
    """

    max_model_len: int | None = None
    max_prompts: int = 16
    max_n: int = 16
    max_prompt_logprobs: int = 4_000_000
    max_waiting_bytes: int = 64 * 2**20
