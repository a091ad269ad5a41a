"""All that arrives in one turn of the event loop is handled together at its end."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Flushable(Protocol):
    """What has taken in something that must be worked on soon."""

    def flush(self, now: float) -> None:
        """Work on it. ``now``: ``time.monotonic``, the same for all of a turn."""

    def fail(self, error: Exception) -> None:
        """``flush`` raised this."""


class Turns:
    """Flushes what was added, once each, after everything that waits to be read has been read.

    One callback for all of a step's streams: no task of theirs has to wake up.
    """

    __slots__ = ("_added",)

    def __init__(self) -> None:
        self._added: list[Flushable] = []

    def add(self, item: Flushable) -> None:
        """Flush ``item`` in the next turn. It must not be added again before."""
        if not self._added:
            asyncio.get_running_loop().call_soon(self._flush)
        self._added.append(item)

    def _flush(self) -> None:
        items, self._added = self._added, []
        now = time.monotonic()
        for item in items:
            try:
                item.flush(now)
            except Exception as error:  # one stream's trouble is not that of the others
                item.fail(error)
