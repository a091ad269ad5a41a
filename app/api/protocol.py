"""uvicorn's HTTP connection with limits: size and number of headers, time for them to arrive, one plain Host."""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.connection import Connection, offer_connection
from app.api.corked import CorkedTransport
from app.api.errors import HttpError, error_bytes
from app.serving.errors import RequestError, Unavailable

_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """header_timeout in seconds, from the first byte of a request (or from connecting) to its last header."""

    header_timeout: float = 10.0
    max_connections: int = 4096
    max_header_bytes: int = 32 * 1024
    max_headers: int = 128


class _Refused(Exception):
    """Stops the parser after a refusal was written."""


class HttpProtocol(HttpToolsProtocol):
    """One connection. Refusals below the application carry the same error body as those above."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._in_head = True
        self._num_head_bytes = 0
        self._is_refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self.attended: Connection | None = None
        self.is_lost = False
        self.corked: CorkedTransport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.corked = CorkedTransport(transport, self.loop)
        super().connection_made(self.corked)  # type: ignore[arg-type]
        if len(self.connections) > self._limits.max_connections:
            self._refuse(Unavailable("the server has too many connections"))
        else:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)
        self.is_lost = True
        if self.attended is not None and self.attended.on_lost is not None:
            self.attended.on_lost()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        # a header without an end is kept by the parser and never reaches on_headers_complete
        if self._in_head and self._num_head_bytes > self._limits.max_header_bytes:
            self._refuse(HttpError(431, "the headers of the request are too large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_head_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        error = self._find_fault()
        if error is not None:
            self._refuse(error)
            raise _Refused
        super().on_headers_complete()
        # the task that answers has not begun yet
        offer_connection(cast(Scope, self.scope), Connection(self, self.cycle))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._tell_blocked(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._tell_blocked(False)

    def _tell_blocked(self, is_blocked: bool) -> None:
        if self.attended is not None and self.attended.on_blocked is not None:
            self.attended.on_blocked(is_blocked)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._num_head_bytes = 0

    def timeout_keep_alive_handler(self) -> None:
        """Called by uvicorn some time after an answer; one that was not even read by then is given up."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP."""
        self._refuse(HttpError(400, msg))

    def _find_fault(self) -> HttpError | None:
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if num_bytes > self._limits.max_header_bytes or len(self.headers) > self._limits.max_headers:
            return HttpError(431, "the headers of the request are too large")
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or any(_HOST.fullmatch(host) is None for host in hosts):
            return HttpError(400, "the Host header is not one host name")
        return None

    def _refuse(self, error: RequestError) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete and not self._is_body_broken():
            # what is wrong came after a request that is still being answered
            self.transport.close()
            return
        body = error_bytes(error)
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()

    def _is_body_broken(self) -> bool:
        return self.cycle.more_body and not self.cycle.response_started

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.header_timeout, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        if self._num_head_bytes:
            self._refuse(HttpError(408, "the headers of the request took too long to arrive", type="timeout_error"))
        else:
            self.transport.close()
