"""What a run prints: the time of each stage, and one line every few seconds where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Clock:
    """The wall-clock limit of one command."""

    def __init__(self, limit_seconds: float, start: float | None = None) -> None:
        """``start`` is the ``time.monotonic()`` at which the command began, now if not given."""
        self._start = time.monotonic() if start is None else start
        self.limit_seconds = limit_seconds

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def remaining(self) -> float:
        return self.limit_seconds - self.elapsed


def say(message: str) -> None:
    """Print a line at once, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


@contextmanager
def stage(name: str, clock: Clock) -> Iterator[None]:
    """Print when a stage begins and how long it took."""
    say(f"[{clock.elapsed:6.1f} s] {name} ...")
    begin = clock.elapsed
    yield
    say(f"[{clock.elapsed:6.1f} s] {name}: {clock.elapsed - begin:.1f} s")


class Bar:
    """A tqdm bar over a fraction from 0 to 1; a plain line every ten seconds where stdout is no terminal."""

    def __init__(self, name: str, interval_seconds: float = 10.0) -> None:
        self._name = name
        self._interval_seconds = interval_seconds
        self._last_line = float("-inf")
        self._bar: tqdm[Any] | None = None
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=1000, desc=name, unit="permille", bar_format="{desc}: {percentage:3.0f}%|{bar}|{postfix}"
            )

    def update(self, fraction: float, note: str) -> None:
        if self._bar is not None:
            self._bar.n = int(1000 * min(fraction, 1.0))
            self._bar.set_postfix_str(note)
            return
        now = time.monotonic()
        if now - self._last_line >= self._interval_seconds:
            self._last_line = now
            print(f"{self._name} {100 * fraction:5.1f} %  {note}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
