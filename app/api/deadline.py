"""How long a request may take: what its client asks for, within what the operator allows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Generator
from contextlib import contextmanager

from starlette.types import Scope

from app.api.errors import HttpError
from app.api.headers import header_values
from app.api.open_requests import OpenRequest

HEADER = "X-Request-Timeout"

_SECONDS = re.compile(r"\d+(\.\d+)?")
# some decades, which event loops can still count
_MOST_SECONDS = 1e9


class DeadlineExceeded(HttpError):
    """A request took longer than was allowed."""

    def __init__(self, seconds: float) -> None:
        # clients try again after 408 by themselves, which here would cost as much and end as this did
        headers = {"x-should-retry": "false"}
        message = f"the request took longer than {seconds:g} seconds, its limit"
        super().__init__(408, message, type="timeout_error", code="deadline_exceeded", headers=headers)


class Deadline:
    """Some seconds from when this is made; None for no end."""

    __slots__ = ("_ends_at", "_loop", "_seconds")

    def __init__(self, seconds: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._ends_at = None if seconds is None else self._loop.time() + seconds

    def shorten(self, seconds: float) -> float:
        """What is left, or ``seconds`` if that is less."""
        return seconds if self._ends_at is None else max(0.0, min(seconds, self._ends_at - self._loop.time()))

    def explain(self, error: HttpError) -> HttpError:
        """What to tell when this, and not another limit of time, has ended the wait for a body."""
        return DeadlineExceeded(self._seconds) if error.status == 408 and self._seconds is not None else error

    @contextmanager
    def limit(self, request: OpenRequest) -> Generator[None, None, None]:
        """A block inside that of ``request``, which ends with DeadlineExceeded when the time has passed."""
        if self._ends_at is None or self._seconds is None:
            yield
            return
        timer = self._loop.call_at(self._ends_at, request.interrupt, DeadlineExceeded(self._seconds))
        try:
            yield
        finally:
            timer.cancel()


def read_deadline(scope: Scope, max_seconds: float) -> Deadline:
    """The shorter of what the header asks for and ``max_seconds``, 0 of which is no limit. Raises HttpError 400."""
    values = header_values(scope, HEADER.lower().encode("ascii"))
    if not values:
        return Deadline(max_seconds or None)
    if len(values) > 1 or _SECONDS.fullmatch(values[0]) is None or float(values[0]) == 0:
        raise HttpError(400, f"{HEADER} should be a number of seconds above 0, such as 30 or 2.5")
    asked = min(float(values[0]), _MOST_SECONDS)
    return Deadline(min(asked, max_seconds) if max_seconds else asked)
