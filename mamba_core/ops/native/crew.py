"""How many threads a step is worth: fewer while something else keeps cores busy.

All threads of a step wait for each other at the end of every phase, so that one which has to share its core holds up
all the others. Measured on two cores of which another process uses one, a thread alone is up to twice as fast as two.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# steps that are compared, and those before them that only warm the new threads up
_COMPARED, _IGNORED = 3, 1
# share of waits in which a thread fell asleep that makes fewer threads worth a trial: nearly 0 on a quiet machine, 0.7
# and more beside a busy core
_SLEEPY = 0.5
# what a change must gain
_GAIN = 0.97
# seconds between trials, and at most so many after trials in vain
_PAUSE, _LONGEST_PAUSE = 0.5, 4.0


class Crew:
    """Compares steps with more or fewer threads, if there is reason to, and stays with what is faster.

    By one thread at first, and by twice as many after every trial in vain: with one thread on each of two busy cores,
    giving up one of them gains nothing.

    ``size`` is asked before each step, and ``observe`` told of it afterwards. Work of different amounts is never
    compared.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._most = self._size = 0
        self._trial: int | None = None
        self._reach = 1
        self._amount = 0
        self._pause = _PAUSE
        self._paused_until = clock()
        # of the steps with this size, and of those of the trial
        self._seconds: deque[float] = deque(maxlen=_COMPARED)
        self._sleepiness: deque[float] = deque(maxlen=_COMPARED)
        self._trial_seconds: list[float] = []

    def size(self, most: int) -> int:
        """Threads of the next step, at most ``most``."""
        if most != self._most:
            self._most = self._size = most
            self._forget()
        return self._size if self._trial is None else self._trial

    def observe(self, amount: int, seconds: float, sleepiness: float) -> None:
        """Learn from a step: how much it did, in any unit, how long it took, and the share of waits slept through."""
        if amount != self._amount:
            self._amount = amount
            self._forget()
        if self._trial is not None:
            self._trial_seconds.append(seconds)
            if len(self._trial_seconds) == _IGNORED + _COMPARED:
                self._decide(self._trial)
            return
        self._seconds.append(seconds)
        self._sleepiness.append(sleepiness)
        if len(self._seconds) == _COMPARED and self._most > 1 and self._clock() >= self._paused_until:
            self._begin()

    def _begin(self) -> None:
        # fewer first: while threads keep each other waiting, more would not help
        if self._size > 1 and min(self._sleepiness) > _SLEEPY:
            self._trial = max(1, self._size - self._reach)
        elif self._size < self._most:
            self._trial = min(self._most, self._size + self._reach)

    def _decide(self, trial: int) -> None:
        before, after = sum(self._seconds), sum(self._trial_seconds[_IGNORED:])
        if after < _GAIN * before:
            self._size, self._pause, self._reach = trial, _PAUSE, 1
        else:
            self._reach = 1 if trial in (1, self._most) else 2 * self._reach
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._forget()
        self._paused_until = self._clock() + self._pause

    def _forget(self) -> None:
        self._trial = None
        self._seconds.clear()
        self._sleepiness.clear()
        self._trial_seconds.clear()
