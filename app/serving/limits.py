"""What an operator bounds in one request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Bounds of one request; what is beyond them is refused before the engine hears of it.

    max_model_len: most tokens of prompt plus output, None for no limit. max_prompts: prompts in one request.
    max_n: continuations of one prompt. max_prompt_logprobs: numbers that ``echo`` with ``logprobs`` may ask for over
    all prompts and alternatives, since each of them is kept in memory until it is sent.
    """

    max_model_len: int | None = None
    max_prompts: int = 16
    max_n: int = 16
    max_prompt_logprobs: int = 500_000
