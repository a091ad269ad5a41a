"""Server-sent events to one client: frames, a ping after silence, and an end for who reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.types import Scope, Send

from app.api.errors import error_bytes
from app.api.open_requests import OpenRequest
from app.api.protocol import ABORT_EXTENSION
from app.serving.errors import RequestError

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}
# how long the last event may take to leave when the client has stopped reading
_LAST_WORDS_SECONDS = 1.0


class ClientStuck(Exception):
    """The client of a stream has read nothing for too long."""


class EventWriter:
    """Writes events; a timer beside it sends pings and interrupts the request when a write is stuck.

    Nothing is sent before the first event or ping, so that what fails before still gets a status of its own.
    """

    def __init__(self, send: Send, request: OpenRequest, ping_interval: float, write_timeout: float) -> None:
        self._send = send
        self._request = request
        self._ping_interval = ping_interval
        self._write_timeout = write_timeout
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._is_writing = False
        self._changed_at = self._loop.time()
        self._ping: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.is_started = False
        self._schedule()

    async def write(self, payloads: Iterable[bytes]) -> None:
        """Send events, all in one chunk."""
        await self._write(b"".join([b"data: " + payload + b"\n\n" for payload in payloads]), more_body=True)

    async def finish(self, error: RequestError | None = None) -> None:
        """Send the last events: the error, if there is one, and the mark of the end. Raises TimeoutError."""
        self.close()
        last = DONE if error is None else b"data: " + error_bytes(error) + b"\n\n" + DONE
        async with asyncio.timeout(_LAST_WORDS_SECONDS):
            await self._write(last, more_body=False)

    def close(self) -> None:
        """Stop the timer and the ping."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ping is not None:
            self._ping.cancel()

    async def _write(self, data: bytes, *, more_body: bool) -> None:
        async with self._lock:
            self._is_writing, self._changed_at = True, self._loop.time()
            try:
                if not self.is_started:
                    self.is_started = True
                    await self._send(dict(_START))
                await self._send({"type": "http.response.body", "body": data, "more_body": more_body})
            finally:
                self._is_writing, self._changed_at = False, self._loop.time()

    def _schedule(self) -> None:
        period = min(self._ping_interval, self._write_timeout, 4.0) / 4
        self._timer = self._loop.call_later(period, self._on_timer)

    def _on_timer(self) -> None:
        unchanged = self._loop.time() - self._changed_at
        if self._is_writing and unchanged >= self._write_timeout:
            self._request.interrupt(ClientStuck())
            return
        if not self._is_writing and unchanged >= self._ping_interval:
            self._ping = self._loop.create_task(self._write(PING, more_body=True))
        self._schedule()


def cut_connection(scope: Scope) -> None:
    """Drop the connection with what it still holds to send, where the server below offers that."""
    extension = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if extension is not None:
        extension["abort"]()
