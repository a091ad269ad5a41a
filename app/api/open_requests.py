"""The requests being answered now: each can be told from outside to stop, by its client leaving or by a shutdown."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from app.api.connection import Connection


class ClientGone(Exception):
    """The client of a request left before the answer was complete."""


class OpenRequest:
    """One request, run by the task that makes this object, as a block.

    The block is left with ClientGone when the client leaves, and with what ``interrupt`` is given.
    """

    def __init__(self, others: OpenRequests, connection: Connection | None, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._others = others
        self._connection = connection
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None
        self._reason: Exception | None = None

    def interrupt(self, reason: Exception) -> None:
        """Make the block end with ``reason`` at its next await; the first reason stands."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def __enter__(self) -> OpenRequest:
        self._others.add(self)
        if self._connection is not None:
            self._connection.watch(self._on_lost)
        else:
            self._watcher = asyncio.create_task(self._watch())
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._watcher is not None:
            self._watcher.cancel()
        self._others.discard(self)
        if self._reason is not None:
            # takes back the cancellation that was asked for
            self._task.uncancel()
            if isinstance(error, asyncio.CancelledError):
                raise self._reason from None

    def _on_lost(self) -> None:
        self.interrupt(ClientGone())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._on_lost()


class OpenRequests:
    """All of them."""

    def __init__(self) -> None:
        self._open: set[OpenRequest] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __len__(self) -> int:
        return len(self._open)

    def track(self, connection: Connection | None, receive: Receive) -> OpenRequest:
        """A block for a request whose body has been read. Without a connection ``receive`` tells that it is lost."""
        return OpenRequest(self, connection, receive)

    def add(self, request: OpenRequest) -> None:
        self._open.add(request)
        self._is_idle.clear()

    def discard(self, request: OpenRequest) -> None:
        self._open.discard(request)
        if not self._open:
            self._is_idle.set()

    def interrupt_all(self, reason: Exception) -> None:
        """End every open request with ``reason``."""
        for request in list(self._open):
            request.interrupt(reason)

    async def wait_idle(self) -> None:
        """Return once no request is open."""
        await self._is_idle.wait()
