"""A completion that fails, is cancelled or closed says so once, and its rows are always freed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from app.engine.interface import EngineStatus, SampleSink
from app.engine.request import GenerationRequest
from app.serving.completions import CompletionService
from app.serving.errors import RequestError, ServerFailure, Unavailable
from tests.fakes import FakeEngine
from tests.serving.completing import Notes, Writes, complete, prepare, stream

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("failure", "kind"), [("error", ServerFailure), ("abort", Unavailable), ("died", Unavailable)])
async def test_a_failure_is_not_followed_by_usage(
    service: CompletionService, engine: FakeEngine, failure: str, kind: type[RequestError]
) -> None:
    engine.fail_at, engine.failure = 2, failure
    writes = Writes()
    with pytest.raises(kind):
        await stream(service, writes, prompt="the dog", stream_options={"include_usage": True})
    assert not any("usage" in chunk for chunk in writes.chunks)


@pytest.mark.parametrize(("failure", "kind"), [("error", ServerFailure), ("abort", Unavailable), ("died", Unavailable)])
async def test_failures_come_after_the_text_before_them(
    service: CompletionService, engine: FakeEngine, failure: str, kind: type[RequestError]
) -> None:
    notes = Notes()
    engine.fail_at, engine.failure = 2, failure
    writes = Writes()
    with pytest.raises(kind):
        await stream(service, writes, notes, prompt=["the dog", "a fox"])
    assert "the" in writes.texts
    with pytest.raises(kind):
        await complete(service, notes)
    assert not engine.live
    assert [call[:2] for call in notes.calls if call[0] == "finish"] == [("finish", "error")] * 2


async def test_an_engine_that_takes_no_requests(service: CompletionService, engine: FakeEngine) -> None:
    prepared = prepare(service)
    engine.status = EngineStatus.RESTARTING
    with pytest.raises(Unavailable) as caught:
        await service.complete(prepared)
    assert caught.value.retry_after is not None
    with pytest.raises(Unavailable):
        service.stream(prepared, Writes())


async def test_an_engine_that_takes_only_the_first_prompt(
    service: CompletionService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine.submit

    def submit_once(request: GenerationRequest, sinks: Sequence[SampleSink]) -> None:
        submit(request, sinks)
        engine.status = EngineStatus.RESTARTING

    monkeypatch.setattr(engine, "submit", submit_once)
    with pytest.raises(Unavailable):
        service.stream(prepare(service, prompt=["a", "b"]), Writes())
    assert not engine.live


@pytest.mark.parametrize("prompt", ["the dog", ["the dog", "a fox"]])
async def test_cancelling_frees_the_rows(service: CompletionService, engine: FakeEngine, prompt: Any) -> None:
    notes = Notes()
    engine.delay = 0.005
    for is_stream in (False, True):
        with anyio.move_on_after(0.05) as scope:
            if is_stream:
                await stream(service, Writes(), notes, prompt=prompt, max_tokens=10**6)
            else:
                await complete(service, notes, prompt=prompt, max_tokens=10**6)
        assert scope.cancelled_caught
        assert not engine.live
    assert [call[1] for call in notes.calls if call[0] == "finish"] == ["abort", "abort"]


async def test_a_stream_closed_at_once_frees_its_rows(service: CompletionService, engine: FakeEngine) -> None:
    writes = Writes()
    run = service.stream(prepare(service, prompt=["a", "b"], n=2, stream=True), writes)
    assert len(engine.live) == 2
    run.close()
    run.close()
    assert not engine.live
    await anyio.sleep(0.01)
    assert not writes.batches


async def test_nothing_is_written_after_a_stream_was_closed(service: CompletionService, engine: FakeEngine) -> None:
    writes = Writes()
    run = service.stream(prepare(service, prompt=["the dog", "a fox"], max_tokens=10**9, stream=True), writes)
    while not writes.batches:
        await anyio.sleep(0)
    # a turn that was begun before meets a run that is closed
    run.close()
    num_batches = len(writes.batches)
    await anyio.sleep(0.01)
    run.resume()
    assert len(writes.batches) == num_batches
    assert not engine.live


async def test_a_dead_engine_is_noticed_while_waiting(service: CompletionService, engine: FakeEngine) -> None:
    engine.delay = 0.01
    task = asyncio.create_task(complete(service, prompt=["a", "b"], max_tokens=10**6))
    await asyncio.sleep(0.03)
    engine.die()
    with pytest.raises(Unavailable):
        await task


async def test_one_stream_that_breaks_is_alone(service: CompletionService, engine: FakeEngine) -> None:
    class Broken(Writes):
        def write(self, *_: object, **__: object) -> None:
            raise RuntimeError("no paper")

    engine.delay = 0.005
    writes = Writes()
    broken, whole = await asyncio.gather(
        stream(service, Broken(), max_tokens=5), stream(service, writes, max_tokens=5), return_exceptions=True
    )
    assert isinstance(broken, ServerFailure)
    assert "paper" not in broken.message
    assert whole is None
    assert "".join(writes.texts) == "the dogthe dogthe"
    assert not engine.live
