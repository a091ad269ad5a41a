"""Full is 429, early and cheap; loading, draining and engineless are 503; both say when to come back."""

from __future__ import annotations

import asyncio

import pytest

from app.api import Phase
from app.api.admission import Admission
from app.engine.interface import EngineStatus
from app.serving.errors import InvalidRequest, Overloaded
from tests.api.conftest import Running, Serve
from tests.api.raw import exchange, post
from tests.api.test_disconnects import wait_for
from tests.api.test_errors import check_error
from tests.fakes import FakeEngine


async def hold(server: Running, **fields: object) -> list[asyncio.Task[object]]:
    """A request that runs until its task is cancelled."""
    num_before = len(server.engine.requests)
    task: asyncio.Task[object] = asyncio.create_task(server.complete(max_tokens=10**6, **fields))
    await wait_for(lambda: len(server.engine.requests) > num_before)
    return [task]


async def cancel(tasks: list[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.anyio
async def test_full_by_rows(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 60.0
    async with serve(max_queue=2) as server:
        # 8 slots and 2 places in the queue
        tasks = await hold(server, n=4) + await hold(server, prompt=["a", "b", "c"], n=2)
        response = await server.complete()
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        check_error(response.headers, response.content, "rate_limit_error")
        assert (await server.client.get("/readyz")).status_code == 200
        await cancel(tasks)
        await server.is_idle()
        engine.delay = 0.0
        assert (await server.complete(max_tokens=1)).status_code == 200


@pytest.mark.anyio
async def test_no_place_for_all_rows_of_a_request(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 60.0
    async with serve(max_queue=2) as server:
        tasks = await hold(server, n=4)
        assert (await server.complete(n=7)).status_code == 429
        response = await server.complete(n=11)
        assert response.status_code == 400
        assert "10" in check_error(response.headers, response.content)["message"]
        await cancel(tasks)
        await server.is_idle()


@pytest.mark.anyio
async def test_full_by_waiting_tokens(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 60.0
    async with serve(max_queue_tokens=100) as server:
        # a prompt beyond the limit is served when nothing else waits
        tasks = await hold(server, prompt=[1] * 200)
        assert (await server.complete(prompt=[1])).status_code == 429
        assert (await server.complete(prompt="x")).status_code == 429
        await cancel(tasks)
        await server.is_idle()
        tasks = await hold(server, prompt=[1] * 60)
        assert (await server.complete(prompt="x" * 400)).status_code == 429
        await cancel(tasks)
        await server.is_idle()


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_wait_no_longer_once_the_first_token_came(serve: Serve, engine: FakeEngine, stream: bool) -> None:
    engine.delay = 0.01
    async with serve(max_queue_tokens=100) as server:
        tasks = await hold(server, prompt=[1] * 200, stream=stream)
        await wait_for(lambda: not server.context.admission.num_waiting_tokens)
        assert (await server.complete(prompt=[1] * 90, max_tokens=1)).status_code == 200
        await cancel(tasks)
        await server.is_idle()


@pytest.mark.anyio
async def test_a_refusal_reads_no_body(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 60.0
    async with serve(max_queue=0) as server:
        tasks = await hold(server, n=8)
        # the body never comes, and the answer does not wait for it
        head, separator, _ = post({"prompt": "hello " * 2000}).partition(b"\r\n\r\n")
        for _ in range(200):
            status, _, _ = await exchange(server.port, head + separator)
            assert status == 429
        assert len(server.engine.requests) == 1
        await cancel(tasks)


def test_admission_keeps_its_books() -> None:
    admission = Admission(max_queue=1, max_queue_tokens=10)
    first = admission.enter(1, 1, 5)
    second = admission.enter(1, 1, 5)
    with pytest.raises(Overloaded):
        admission.check(1)
    with pytest.raises(Overloaded):
        admission.enter(1, 1, 1)
    with pytest.raises(InvalidRequest):
        admission.enter(1, 3, 1)
    first.count_tokens(8)
    assert admission.num_waiting_tokens == 13
    for ticket in (first, second, first):
        ticket.close()
    assert (admission.num_rows, admission.num_waiting_tokens) == (0, 0)
    admission.check(1)


@pytest.mark.anyio
async def test_loading_is_503(serve: Serve) -> None:
    async with serve(is_loading=True) as server:
        assert (await server.client.get("/livez")).status_code == 200
        for response in (
            await server.client.get("/readyz"),
            await server.client.get("/health"),
            await server.complete(),
        ):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            check_error(response.headers, response.content, "service_unavailable_error")
        assert (await server.client.get("/metrics")).status_code == 200
        assert (await server.client.get("/load")).json()["ready"] is False


@pytest.mark.anyio
async def test_an_engine_that_is_started_again_is_503(serve: Serve, engine: FakeEngine) -> None:
    async with serve() as server:
        assert (await server.client.get("/readyz")).status_code == 200
        engine.status = EngineStatus.RESTARTING
        assert (await server.client.get("/readyz")).status_code == 503
        assert (await server.client.get("/livez")).status_code == 200
        assert (await server.complete()).status_code == 503
        engine.status = EngineStatus.READY
        assert (await server.complete(max_tokens=1)).status_code == 200


@pytest.mark.anyio
async def test_an_engine_that_hangs(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 60.0
    async with serve(heartbeat_timeout=10) as server:
        engine.heartbeat_age = lambda: 100.0  # type: ignore[method-assign]
        # an idle engine owes no sign of life
        assert (await server.client.get("/readyz")).status_code == 200
        engine.heartbeat_age = lambda: 0.0  # type: ignore[method-assign]
        tasks = await hold(server)
        for age, ready, live in [(0.0, 200, 200), (11.0, 503, 200), (21.0, 503, 503)]:
            engine.heartbeat_age = lambda age=age: age  # type: ignore[method-assign, misc]
            assert (await server.client.get("/readyz")).status_code == ready
            assert (await server.client.get("/livez")).status_code == live
        await cancel(tasks)


@pytest.mark.anyio
async def test_draining_refuses_new_requests_and_keeps_open_ones(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.02
    async with serve() as server:
        running = asyncio.create_task(server.complete(max_tokens=20, stream=True))
        await wait_for(lambda: engine.live)
        server.context.phase = Phase.DRAINING
        response = await server.complete()
        assert response.status_code == 503
        assert response.headers["connection"] == "close"
        assert (await server.client.get("/readyz")).status_code == 503
        assert (await server.client.get("/livez")).status_code == 200
        assert (await running).text.endswith("data: [DONE]\n\n")
