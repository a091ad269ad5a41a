"""All that arrives in one turn of the event loop is handled together at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from app.serving.observer import GapObserver

# how long tokens of streams that have begun may wait for others to begin: long against the work of a turn, which each
# write of theirs makes longer, and short for a reader
_HOLD_SECONDS = 0.01
# or so many times as long as all of them took to be written, where that is slow
_HOLD_RATIO = 3


class Flushable(Protocol):
    """What has taken in something that must be worked on soon."""

    @property
    def has_begun(self) -> bool:
        """Whether it has told something already, so that more may wait a little."""

    def flush(self, now: float) -> None:
        """Work on it. ``now``: ``time.monotonic``, the same for all of a turn."""

    def fail(self, error: Exception) -> None:
        """``flush`` raised this."""


class Turns:
    """Flushes what was added, once each, after everything that waits to be read has been read.

    One callback for all of a step's streams: no task of theirs has to wake up.

    ``is_crowded`` tells whether requests wait to be begun, each turn some of them. Meanwhile those that have begun are
    flushed only now and then, so that the first tokens of the others do not wait for all of their writes.
    """

    __slots__ = ("_added", "_gaps", "_hold_until", "_is_crowded", "_observer")

    def __init__(self, observer: GapObserver | None, is_crowded: Callable[[], bool] = lambda: False) -> None:
        self._observer = observer
        self._is_crowded = is_crowded
        self._hold_until = 0.0
        self._added: list[Flushable] = []
        self._gaps: dict[float, int] = {}

    def add(self, item: Flushable) -> None:
        """Flush ``item`` in the next turn, or in one soon after. It must not be added again before."""
        if not self._added:
            asyncio.get_running_loop().call_soon(self._flush)
        self._added.append(item)

    def count_gap(self, last: float) -> None:
        """A stream that is being flushed got tokens, after the turn at ``last``: many streams share that time."""
        self._gaps[last] = self._gaps.get(last, 0) + 1

    def _flush(self) -> None:
        items, self._added = self._added, []
        now = time.monotonic()
        is_holding = self._is_crowded() and now < self._hold_until
        for item in self._put_off(items) if is_holding else items:
            try:
                item.flush(now)
            except Exception as error:  # one stream's trouble is not that of the others
                item.fail(error)
        if self._observer is not None:
            for last, num_gaps in self._gaps.items():
                self._observer.on_gaps(num_gaps, now - last)
        self._gaps.clear()
        if not is_holding:
            ended = time.monotonic()
            self._hold_until = ended + max(_HOLD_SECONDS, _HOLD_RATIO * (ended - now))

    def _put_off(self, items: list[Flushable]) -> list[Flushable]:
        """Those that have told nothing yet. The others are added again."""
        self._added = [item for item in items if item.has_begun]
        if self._added:
            asyncio.get_running_loop().call_soon(self._flush)
        return [item for item in items if not item.has_begun]
