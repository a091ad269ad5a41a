"""What observers hear of completions: first tokens, gaps between tokens, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from app.serving.completions import CompletionService
from tests.fakes import FakeEngine
from tests.serving.completing import Notes, complete, says

pytestmark = pytest.mark.anyio


async def test_what_observers_hear(make_service: Callable[..., CompletionService], engine: FakeEngine) -> None:
    notes = Notes()
    service = make_service(notes)
    engine.burst = 2
    await complete(service, notes, n=2, max_tokens=3)
    assert notes.calls == [("first",), ("finish", "length", 2, 6), ("gaps", 1)]
    notes.calls.clear()
    await complete(service, notes, echo=True, max_tokens=0, logprobs=0)
    assert notes.calls == [("finish", "length", 2, 0)]
    notes.calls.clear()
    engine.script = says("a")
    await complete(service, notes)
    assert notes.calls == [("first",), ("finish", "stop", 2, 2)]


async def test_gaps_of_all_streams_are_counted(
    make_service: Callable[..., CompletionService], engine: FakeEngine
) -> None:
    notes = Notes()
    service = make_service(notes)
    engine.delay = 0.002
    await asyncio.gather(*(complete(service, max_tokens=number + 1) for number in range(5)))
    assert sum(num_gaps for _, num_gaps in notes.calls) == 0 + 1 + 2 + 3 + 4
