"""A transport that gathers what is written in one turn of the event loop: one system call instead of several."""

from __future__ import annotations

import asyncio
from typing import Any


class CorkedTransport:
    """Stands before a connection's transport, whose order of bytes it keeps. Head, body and end of a short answer are
    written one after the other without anything between them, and each would be a packet of its own."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._gathered: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Leaves at the end of the turn."""
        if not self._gathered:
            self._loop.call_soon(self._flush)
        self._gathered.append(data)

    def write_now(self, data: bytes) -> None:
        """Leaves at once, unless something that leaves later was written before."""
        if self._gathered:
            self._gathered.append(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        # all else is the transport's
        return getattr(self._transport, name)

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, []
        if gathered and not self._transport.is_closing():
            self._transport.write(b"".join(gathered))
