"""What is flushed when, while requests wait to be begun and while none does."""

from __future__ import annotations

import asyncio
import time

import pytest

from app.serving import turns
from app.serving.turns import Turns

pytestmark = pytest.mark.anyio


class Item:
    """Something to flush that knows how often it was."""

    def __init__(self, *, has_begun: bool) -> None:
        self.has_begun = has_begun
        self.num_flushes = 0

    def flush(self, now: float) -> None:  # noqa: ARG002
        self.num_flushes += 1

    def fail(self, error: Exception) -> None:
        raise error


class Crowd:
    def __init__(self) -> None:
        self.is_there = False

    def __call__(self) -> bool:
        return self.is_there


async def pass_turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def flush_all(turns: Turns) -> None:
    """The last time that all were flushed is now."""
    turns.add(Item(has_begun=True))
    await pass_turns()


@pytest.fixture
def long_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_HOLD_SECONDS", 1000.0)


async def test_everything_is_flushed_while_nobody_waits() -> None:
    turns, items = Turns(None, Crowd()), [Item(has_begun=True), Item(has_begun=False)]
    for item in items:
        turns.add(item)
    await pass_turns()
    assert [item.num_flushes for item in items] == [1, 1]


@pytest.mark.usefixtures("long_hold")
async def test_those_that_have_begun_wait_for_a_crowd_to_begin() -> None:
    crowd = Crowd()
    turns, old, new, later = Turns(None, crowd), *(Item(has_begun=begun) for begun in (True, False, False))
    await flush_all(turns)
    crowd.is_there = True
    turns.add(old)
    turns.add(new)
    await pass_turns()
    turns.add(later)
    await pass_turns()
    assert [item.num_flushes for item in (old, new, later)] == [0, 1, 1]
    crowd.is_there = False
    await pass_turns()
    assert [item.num_flushes for item in (old, new, later)] == [1, 1, 1]


async def test_those_that_have_begun_do_not_wait_long() -> None:
    crowd, item = Crowd(), Item(has_begun=True)
    turns = Turns(None, crowd)
    await flush_all(turns)
    crowd.is_there = True
    turns.add(item)
    deadline = time.monotonic() + 20
    while not item.num_flushes and time.monotonic() < deadline:
        await asyncio.sleep(0)
    assert item.num_flushes == 1
