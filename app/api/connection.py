"""The connection under one answer, for what ASGI's messages cannot say or say too slowly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.api.corked import CorkedTransport

_EXTENSION = "mamba.connection"


class ConnectionOwner(Protocol):
    """The server's end of a connection, which answers one request after the other."""

    corked: CorkedTransport
    # of the request that is being answered, once it has asked for news
    attended: Connection | None

    @property
    def is_lost(self) -> bool: ...


class Connection:
    """One request's view of its connection. What it is told ends with ``close``."""

    __slots__ = ("_cycle", "_is_open", "_owner", "_transport", "on_blocked", "on_lost")

    def __init__(self, owner: ConnectionOwner, cycle: RequestResponseCycle) -> None:
        self._owner = owner
        self._cycle = cycle
        self._transport = owner.corked
        self._is_open = False
        self.on_lost: Callable[[], None] | None = None
        self.on_blocked: Callable[[bool], None] | None = None

    @property
    def is_blocked(self) -> bool:
        """Whether writing is to be put off now."""
        return bool(self._cycle.flow.write_paused)

    @property
    def has_body(self) -> bool:
        """Whether all of the request is here."""
        return not self._cycle.more_body

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Have ``on_lost`` called once the client has gone, at once if it has. To be called when the body is read."""
        self._owner.attended = self
        self.on_lost = on_lost
        if self._owner.is_lost:
            on_lost()
        else:
            # a body whose last piece was large leaves the server below not reading, not even the client's end
            self._cycle.flow.resume_reading()

    def open(self, on_blocked: Callable[[bool], None]) -> bool:
        """Whether ``write`` will do anything, now that the head was sent: not for HEAD, which has no chunked body.

        ``on_blocked`` is called whenever ``is_blocked`` changes.
        """
        self._owner.attended = self
        self.on_blocked = on_blocked
        self._is_open = bool(self._cycle.chunked_encoding)
        return self._is_open

    def write(self, data: bytes) -> None:
        """Send one chunk of an answer whose head and end ASGI sends, without a task and without a message.

        More than the connection takes is buffered, however much it is. Does nothing before ``open``, after ``close``
        and after the client has left. ``data`` may not be empty.
        """
        if self._is_open and not self._owner.is_lost:
            self._transport.write_now(b"%x\r\n%b\r\n" % (len(data), data))

    def cut(self) -> None:
        """Drop the connection with what it still holds to send."""
        self._transport.abort()

    def close(self) -> None:
        """Write nothing and be told nothing any more; to be called before the end is sent. Idempotent."""
        if self._owner.attended is self:
            self._owner.attended = None
        self._is_open = False
        self.on_lost = self.on_blocked = None


def offer_connection(scope: Scope, connection: Connection) -> None:
    """Let whoever answers this request find its connection."""
    scope["extensions"] = {_EXTENSION: {"connection": connection}}


def find_connection(scope: Scope) -> Connection | None:
    """None where the server below is not ours."""
    extension = scope.get("extensions", {}).get(_EXTENSION)
    connection: Connection | None = extension and extension["connection"]
    return connection
