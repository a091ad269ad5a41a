"""Requests that arrive together are begun a few at a time: the first get tokens while the last are still to be read."""

from __future__ import annotations

import asyncio
from collections import deque

# a millisecond or two of work, after which what the engine has sent meanwhile is read and written: that takes a first
# token a few turns
_REQUESTS_PER_TURN = 8


class Gate:
    """Lets so many through in one turn of the event loop, in the order in which they come."""

    def __init__(self, num_per_turn: int = _REQUESTS_PER_TURN) -> None:
        self._num_per_turn = num_per_turn
        self._num_left = num_per_turn
        self._is_counting = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_crowded(self) -> bool:
        """Whether anybody waits; then each turn of the event loop is followed by another at once."""
        return bool(self._waiting)

    async def enter(self) -> None:
        """Return at once, or in one of the next turns if many have come before."""
        loop = asyncio.get_running_loop()
        if not self._is_counting:
            self._is_counting = True
            loop.call_soon(self._begin_turn)
        if self._num_left > 0 and not self._waiting:
            self._num_left -= 1
            return
        self._waiting.append(loop.create_future())
        await self._waiting[-1]

    def _begin_turn(self) -> None:
        self._num_left = self._num_per_turn
        while self._waiting and self._num_left > 0:
            place = self._waiting.popleft()
            # who has given up meanwhile takes nothing
            if not place.done():
                place.set_result(None)
                self._num_left -= 1
        self._is_counting = self._num_left < self._num_per_turn
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._begin_turn)
