"""All that arrives in one turn of the event loop is handled together at its end."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from app.serving.observer import GapObserver


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

    __slots__ = ("_added", "_gaps", "_observer")

    def __init__(self, observer: GapObserver | None) -> None:
        self._observer = observer
        self._added: list[Flushable] = []
        self._gaps: dict[float, int] = {}

    def add(self, item: Flushable) -> None:
        """Flush ``item`` in the next turn. It must not be added again before."""
        if not self._added:
            asyncio.get_running_loop().call_soon(self._flush)
        self._added.append(item)

    def count_gap(self, last: float) -> None:
        """A stream that is being flushed got tokens, after the turn at ``last``: many streams share that time."""
        self._gaps[last] = self._gaps.get(last, 0) + 1

    def _flush(self) -> None:
        items, self._added = self._added, []
        now = time.monotonic()
        for item in items:
            try:
                item.flush(now)
            except Exception as error:  # one stream's trouble is not that of the others
                item.fail(error)
        if self._observer is not None:
            for last, num_gaps in self._gaps.items():
                self._observer.on_gaps(num_gaps, now - last)
        self._gaps.clear()
