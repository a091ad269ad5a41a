"""The keys in force, and what is being used under each of their names."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import deque
from collections.abc import Callable, Iterable

from app.keys import ApiKey, KeyLimits
from app.serving.errors import Overloaded

_MINUTE = 60
_RETRY_CONCURRENCY = 1.0

Clock = Callable[[], float]


class MinuteWindow:
    """How much was counted in the last 60 seconds. Counts by whole seconds, so that there are at most 61 numbers."""

    __slots__ = ("_amounts", "_total")

    def __init__(self) -> None:
        self._amounts: deque[tuple[int, int]] = deque()
        self._total = 0

    def add(self, amount: int, now: float) -> None:
        second = int(now)
        self._total += amount
        if self._amounts and self._amounts[-1][0] == second:
            amount += self._amounts.pop()[1]
        self._amounts.append((second, amount))

    def wait(self, limit: int, now: float) -> float:
        """Seconds until less than ``limit``, which is at least 1, is counted; 0 if that is so now."""
        while self._amounts and self._leaves_at(0) <= now:
            self._total -= self._amounts.popleft()[1]
        excess, place = self._total - limit, 0
        if excess < 0:
            return 0.0
        while (excess := excess - self._amounts[place][1]) >= 0:
            place += 1
        return self._leaves_at(place) - now

    def _leaves_at(self, place: int) -> int:
        # the last moment of its second is over a minute ago
        return self._amounts[place][0] + 1 + _MINUTE


class Account:
    """What is used under one name."""

    __slots__ = ("_clock", "_num_open", "_requests", "_tokens", "limits", "name")

    def __init__(self, name: str, limits: KeyLimits, clock: Clock = time.monotonic) -> None:
        self.name = name
        self.limits = limits
        self._clock = clock
        self._num_open = 0
        self._requests = MinuteWindow()
        self._tokens = MinuteWindow()

    def enter(self) -> None:
        """Count a request, for which ``leave`` must be called. Raises Overloaded, counting nothing, at a limit."""
        limits, now = self.limits, self._clock()
        if limits.max_concurrency and self._num_open >= limits.max_concurrency:
            raise _refusal(f"this key may have {limits.max_concurrency} requests open at once", _RETRY_CONCURRENCY)
        for window, limit, what in (
            (self._requests, limits.requests_per_minute, "requests"),
            (self._tokens, limits.tokens_per_minute, "tokens"),
        ):
            seconds = window.wait(limit, now) if limit else 0.0
            if seconds:
                raise _refusal(f"this key may use {limit} {what} in a minute", seconds)
        self._requests.add(1, now)
        self._num_open += 1

    def leave(self, num_tokens: int) -> None:
        """The request is over, and took so many tokens of prompt and answer."""
        self._num_open -= 1
        if num_tokens:
            self._tokens.add(num_tokens, self._clock())


class KeyRing:
    """The keys that open this server; one object for all layers that ask."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._accounts: dict[str, Account] = {}
        self._digests: list[tuple[bytes, Account]] = []
        self.replace(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Take other keys from now on. What was used under names that stay still counts."""
        accounts: dict[str, Account] = {}
        digests = []
        for key in keys:
            account = self._accounts.get(key.name) or accounts.get(key.name) or Account(key.name, key.limits)
            account.limits = key.limits
            accounts[key.name] = account
            # digests have one length, so that comparing them tells nothing of a key's
            digests.append((_digest(key.secret.encode("ascii")), account))
        self._accounts, self._digests = accounts, digests

    def find(self, authorizations: list[str]) -> Account | None:
        """Whose key the one Authorization header holds; takes the same time for every key."""
        scheme, _, key = authorizations[0].partition(" ") if len(authorizations) == 1 else ("", "", "")
        digest = _digest(key.strip().encode("latin-1"))
        matches = [account for known, account in self._digests if hmac.compare_digest(digest, known)]
        return matches[0] if matches and scheme.lower() == "bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(reason: str, seconds: float) -> Overloaded:
    return Overloaded(f"{reason}; try again in {max(1, math.ceil(seconds))} s", retry_after=seconds)
