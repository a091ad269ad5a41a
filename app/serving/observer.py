"""What metrics may see of a completion, without this room knowing of metrics."""

from __future__ import annotations

from typing import Protocol


class CompletionObserver(Protocol):
    """Told about one completion. Must not block."""

    def on_first_token(self, seconds: float) -> None:
        """Its first token has come, ``seconds`` after ``prepare`` began."""

    def on_finish(self, reason: str, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        """The completion is over, called exactly once.

        reason: "stop", "length" (any choice ended by it), "error", or "abort" for a client that left.
        """


class GapObserver(Protocol):
    """Told about the tokens of all completions after their first ones. Must not block."""

    def on_gaps(self, num_gaps: int, seconds: float) -> None:
        """``num_gaps`` completions got more tokens, ``seconds`` after they had got some before."""
