"""Server-sent events to one client: frames, a ping after silence, and an end for who reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext

from starlette.types import Send

from app.api.connection import Connection
from app.api.errors import error_bytes
from app.api.open_requests import OpenRequest
from app.serving.errors import RequestError
from app.serving.forms import LastWords
from app.serving.run import CompletionRun

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


class EventStream:
    """The outlet of one streamed completion, used by the task that answers the request.

    Head and end are sent as ASGI wants it, by that task. Between them events go past all tasks to the connection,
    where the server below offers that (``connection.Connection``); elsewhere the task sends them too.

    Nothing is sent before the first event or ping, so that what fails before still gets a status of its own. A timer
    sends pings, and interrupts the request when the client has read nothing for ``write_timeout`` seconds.
    """

    __slots__ = (
        "_changed_at",
        "_connection",
        "_has_changed",
        "_held",
        "_is_direct",
        "_last_words",
        "_loop",
        "_on_free",
        "_period",
        "_ping_interval",
        "_request",
        "_send",
        "_timer",
        "_wake",
        "_write_timeout",
        "is_blocked",
        "is_started",
    )
    frame = (b"data: ", b"\n\n")

    def __init__(
        self,
        connection: Connection | None,
        send: Send,
        request: OpenRequest,
        ping_interval: float,
        write_timeout: float,
        last_words: LastWords | None = None,
    ) -> None:
        self._connection = connection
        self._send = send
        self._request = request
        self._ping_interval = ping_interval
        self._write_timeout = write_timeout
        self._last_words = last_words or _done
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._on_free: Callable[[], None] = self._wake.set
        # events that the task is to send: now, if blocked, and otherwise with the end
        self._held = b""
        self._has_changed = False
        self._changed_at = self._loop.time()
        self._period = min(ping_interval, write_timeout, 4.0) / 4
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(self._period, self._on_timer)
        self._is_direct = False
        self.is_started = False
        self.is_blocked = False

    def write(self, chunks: bytes, *, is_last: bool = False) -> None:
        """Send events, all in one piece; the last ones are left to ``finish``."""
        self._has_changed = True
        if is_last:
            self._held = chunks
        elif self._is_direct and self._connection is not None:
            self._connection.write(chunks)
        else:
            self._held = chunks
            self.is_blocked = True
            self._wake.set()

    async def follow(self, run: CompletionRun) -> None:
        """Return once the run is over and all of it has left, or as much as the connection holds. Raises
        RequestError."""
        self._on_free = run.resume
        run.done.add_done_callback(self._on_done)
        while not run.done.done() or self.is_blocked:
            await self._wake.wait()
            self._wake.clear()
            if self._held and self.is_blocked:
                await self._send_held()
        run.check()

    async def finish(self, error: RequestError | None = None) -> None:
        """Send the last events: the error, if there is one, and what marks the end. Raises TimeoutError."""
        is_free = not self.is_blocked
        self.close()
        last = self._last_words(self.frame, error)
        # what is free to be written needs no clock
        async with nullcontext() if is_free else asyncio.timeout(_LAST_WORDS_SECONDS):
            await self._start()
            await self._send({"type": "http.response.body", "body": self._held + last, "more_body": False})

    def close(self) -> None:
        """Stop the timer, and write nothing any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._on_free = self._wake.set
        self.is_blocked = True

    async def _send_held(self) -> None:
        await self._start()
        held, self._held = self._held, b""
        await self._send({"type": "http.response.body", "body": held, "more_body": True})
        if self._connection is not None:
            self._is_direct = self._connection.open(self._set_blocked)
        self._set_blocked(self._connection is not None and self._connection.is_blocked)

    async def _start(self) -> None:
        if not self.is_started:
            self.is_started = True
            await self._send(dict(_START))

    def _set_blocked(self, is_blocked: bool) -> None:
        self._has_changed = True
        self.is_blocked = is_blocked
        if not is_blocked:
            self._on_free()
            self._wake.set()

    def _on_done(self, _: object) -> None:
        self._wake.set()

    def _on_timer(self) -> None:
        now = self._loop.time()
        if self._has_changed:
            self._has_changed, self._changed_at = False, now
        unchanged = now - self._changed_at
        if self.is_blocked and unchanged >= self._write_timeout:
            self._request.interrupt(ClientStuck())
            return
        if not self.is_blocked and not self._held and unchanged >= self._ping_interval:
            self.write(PING)
        self._timer = self._loop.call_later(self._period, self._on_timer)


def _done(frame: tuple[bytes, bytes], error: RequestError | None) -> bytes:
    return DONE if error is None else frame[0] + error_bytes(error) + frame[1] + DONE
