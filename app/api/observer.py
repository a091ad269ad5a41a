"""Hears of the tokens of every completion, in the task of its request."""

from __future__ import annotations

from contextvars import ContextVar

from app.api.admission import Ticket
from app.logging import note
from app.metrics import ServerMetrics

_ticket: ContextVar[Ticket | None] = ContextVar("ticket", default=None)


def bind_ticket(ticket: Ticket) -> None:
    """The current task answers the request that holds this ticket."""
    _ticket.set(ticket)


class CompletionObserver:
    """Frees a request's share of waiting tokens when its first one comes, and tells metrics and log."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self.on_tokens = metrics.on_tokens

    def on_first_token(self, seconds: float) -> None:
        ticket = _ticket.get()
        if ticket is not None:
            ticket.count_tokens(0)
        note(first_token_ms=round(seconds * 1000, 1))
        self._metrics.on_first_token(seconds)

    def on_finish(self, reason: str, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        note(finish=reason, prompt_tokens=prompt_tokens, generated_tokens=generated_tokens)
        self._metrics.on_finish(reason, prompt_tokens, generated_tokens, seconds)
