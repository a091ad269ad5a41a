"""What metrics may see of a completion, without this room knowing of metrics."""

from __future__ import annotations

from typing import Protocol


class CompletionObserver(Protocol):
    """Told about one completion, with at most one call of a kind per batch of events. Must not block."""

    def on_first_token(self, seconds: float) -> None:
        """Its first token has come, ``seconds`` after ``prepare`` began."""

    def on_tokens(self, n: int, seconds_since_last: float) -> None:
        """``n`` more tokens over all choices, ``seconds_since_last`` after the batch before; not for the first one."""

    def on_finish(self, reason: str, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        """The completion is over, called exactly once.

        reason: "stop", "length" (any choice ended by it), "error", or "abort" for a client that left.
        """
