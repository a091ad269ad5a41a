"""The requests being answered now: each can be told from outside to stop, by its client leaving or by a shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive


class ClientGone(Exception):
    """The client of a request left before the answer was complete."""


class OpenRequest:
    """One request, run by the task that made this object."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.reason: Exception | None = None

    def interrupt(self, reason: Exception) -> None:
        """Make the request's block end with ``reason`` at its next await; the first reason stands."""
        if self.reason is None:
            self.reason = reason
            self._task.cancel()

    def close(self) -> None:
        """Take back the cancellation that ``interrupt`` asked for."""
        if self.reason is not None:
            self._task.uncancel()


class OpenRequests:
    """All of them."""

    def __init__(self) -> None:
        self._open: set[OpenRequest] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def track(self, receive: Receive) -> AsyncIterator[OpenRequest]:
        """Watch a request whose body has been read.

        The block is left with ClientGone when the client leaves, and with what ``interrupt_all`` was given.
        """
        request = OpenRequest()
        self._open.add(request)
        self._is_idle.clear()
        watcher = asyncio.create_task(_watch(receive, request))
        try:
            yield request
        except asyncio.CancelledError:
            if request.reason is None:
                raise
            raise request.reason from None
        finally:
            watcher.cancel()
            request.close()
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


async def _watch(receive: Receive, request: OpenRequest) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    request.interrupt(ClientGone())
