"""Hears of one completion."""

from __future__ import annotations

from app.api.admission import Ticket
from app.logging import current_notes
from app.metrics import ServerMetrics


class CompletionObserver:
    """Frees the request's share of waiting tokens when the first one comes, and tells metrics and log.

    To be made in the request's task; may be called from anywhere.
    """

    def __init__(self, metrics: ServerMetrics, ticket: Ticket) -> None:
        self._metrics = metrics
        self._ticket = ticket
        self._notes = current_notes()

    def on_first_token(self, seconds: float) -> None:
        self._ticket.count_tokens(0)
        self._notes["first_token_ms"] = round(seconds * 1000, 1)
        self._metrics.on_first_token(seconds)

    def on_finish(self, reason: str, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        self._notes |= {"finish": reason, "prompt_tokens": prompt_tokens, "generated_tokens": generated_tokens}
        self._metrics.on_finish(reason, prompt_tokens, generated_tokens, seconds)
