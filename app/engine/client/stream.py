"""The events of one request on their way from the socket to whoever awaits them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from app.engine.request import Event, GenerationRequest, TokenEvent


class EngineStream:
    """One request's events; see ``interface.RequestStream``. ``abandon`` is called when it is closed too early."""

    def __init__(self, request: GenerationRequest, abandon: Callable[[EngineStream], None]) -> None:
        self.request_id = request.request_id
        self._abandon = abandon
        self._events: list[Event] = []
        self._num_unfinished = request.n
        self._error: Exception | None = None
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> list[Event]:
        while not self._events:
            if self._is_closed or self.is_finished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._events.clear()
        self._wake()
        if not self.is_finished and self._error is None:
            self._abandon(self)

    def push(self, event: Event) -> None:
        """Hand over one more event."""
        if isinstance(event, TokenEvent) and event.finish_reason is not None:
            self._num_unfinished -= 1
        self._events.append(event)
        self._wake()

    def fail(self, error: Exception) -> None:
        """No more events will come; what has arrived is still delivered."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
