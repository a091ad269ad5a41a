"""What is used under a key's name: counted, limited, refused before the body, and told to the log by name alone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.keys import Account, KeyRing, MinuteWindow
from app.keys import ApiKey, KeyLimits
from app.serving.errors import Overloaded
from tests.api.conftest import Running, Serve
from tests.api.raw import exchange, post
from tests.api.test_disconnects import wait_for
from tests.api.test_errors import check_error
from tests.fakes import FakeEngine


class Clock:
    """Stands still until told otherwise."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def ask(server: Running, key: str, **fields: Any) -> Any:
    body = {"prompt": "hello", "max_tokens": 3, **fields}
    return await server.client.post("/v1/completions", json=body, headers=bearer(key))


@pytest.fixture
def key_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "keys"
    path.write_text(
        "sk-plain\nalice = sk-alice\nalice = sk-alice-next\nbatch = sk-batch max-concurrency=1 requests-per-minute=0\n"
    )
    return path


@pytest.mark.anyio
async def test_requests_per_minute(serve: Serve, key_file: Path, engine: FakeEngine) -> None:
    async with serve(api_key_file=str(key_file), key_requests_per_minute=2) as server:
        # both keys of a name count together
        assert (await ask(server, "sk-alice")).status_code == 200
        assert (await ask(server, "sk-alice-next", stream=True)).status_code == 200
        for key in ("sk-alice", "sk-alice-next"):
            response = await ask(server, key)
            assert response.status_code == 429
            assert 55 <= int(response.headers["retry-after"]) <= 61
            error = check_error(response.headers, response.content, "rate_limit_error")
            assert "2 requests" in error["message"]
        # others are not touched, nor what costs nothing
        assert (await ask(server, "sk-plain")).status_code == 200
        assert [(await ask(server, "sk-batch")).status_code for _ in range(4)] == [200] * 4
        response = await server.client.get("/v1/models", headers=bearer("sk-alice"))
        assert response.status_code == 200
        assert len(engine.requests) == 7


@pytest.mark.anyio
async def test_requests_at_once(serve: Serve, key_file: Path, engine: FakeEngine) -> None:
    async with serve(api_key_file=str(key_file)) as server:
        engine.delay = 60.0
        running = asyncio.create_task(ask(server, "sk-batch", stream=True))
        await wait_for(lambda: engine.live)
        response = await ask(server, "sk-batch")
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        check_error(response.headers, response.content, "rate_limit_error")
        engine.delay = 0.0
        assert (await ask(server, "sk-alice")).status_code == 200
        # who leaves makes room
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.is_idle()
        assert [(await ask(server, "sk-batch")).status_code for _ in range(3)] == [200] * 3
        # and so does who is refused for something else
        assert (await ask(server, "sk-batch", max_tokens="x")).status_code == 400
        assert (await ask(server, "sk-batch")).status_code == 200


@pytest.mark.anyio
async def test_tokens_per_minute(serve: Serve, key_file: Path) -> None:
    async with serve(api_key_file=str(key_file), key_tokens_per_minute=16) as server:
        # 5 of the prompt and 3 of the answer each
        assert [(await ask(server, "sk-alice")).status_code for _ in range(3)] == [200, 200, 429]
        response = await ask(server, "sk-alice")
        assert int(response.headers["retry-after"]) >= 55
        assert "16 tokens" in check_error(response.headers, response.content, "rate_limit_error")["message"]


@pytest.mark.anyio
async def test_a_refusal_reads_no_body_and_asks_no_model(serve: Serve, engine: FakeEngine) -> None:
    async with serve(api_key=["sk-one"], key_requests_per_minute=1, is_loading=True) as server:
        head, separator, _ = post({"prompt": "x" * 10_000}, "Authorization: Bearer sk-one").partition(b"\r\n\r\n")
        assert (await exchange(server.port, head + separator))[0] == 503
        for _ in range(100):
            assert (await exchange(server.port, head + separator))[0] == 429
        assert engine.requests == []


@pytest.mark.anyio
async def test_the_log_tells_the_name_and_never_the_key(
    serve: Serve, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(api_key_file=str(key_file), key_requests_per_minute=1) as server:
        for key in ("sk-alice", "sk-alice", "sk-plain", "sk-wrong"):
            await ask(server, key)
        records = [record for record in caplog.records if record.name == "app.access"]
        assert [vars(record).get("key") for record in records] == ["alice", "alice", "key-1", None]
        assert [record.getMessage().split()[-1] for record in records] == ["200", "429", "200", "401"]
        assert not any("sk-" in str(vars(record)) for record in caplog.records if record.name.startswith("app"))
        page = (await server.client.get("/metrics")).text
        assert "alice" not in page


def test_other_keys_take_over_what_was_counted() -> None:
    ring = KeyRing([ApiKey("a", "alice", KeyLimits(requests_per_minute=1)), ApiKey("b", "bob")])
    first = ring.find(["Bearer a"])
    assert first is not None
    first.enter()
    ring.replace([ApiKey("c", "alice", KeyLimits(requests_per_minute=1)), ApiKey("d", "alice", KeyLimits(0, 1, 0))])
    assert ring.find(["Bearer a"]) is ring.find(["Bearer b"]) is None
    assert ring.find(["Bearer c"]) is ring.find(["Bearer d"]) is first
    with pytest.raises(Overloaded):
        first.enter()
    ring.replace([ApiKey("c", "alice", KeyLimits(requests_per_minute=2))])
    first.enter()


def test_limits_of_an_account() -> None:
    clock = Clock(1000.5)
    account = Account("alice", KeyLimits(2, 3, 100), clock)
    account.enter()
    account.enter()
    with pytest.raises(Overloaded, match="may have 2 requests open"):
        account.enter()
    account.leave(60)
    account.leave(60)
    with pytest.raises(Overloaded, match="100 tokens") as caught:
        account.enter()
    assert caught.value.retry_after == 60.5
    clock.now += 60.5
    account.enter()


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5)), max_size=60), st.integers(1, 20))
def test_no_minute_holds_more_than_its_limit(steps: list[tuple[float, int]], limit: int) -> None:
    """Whoever waits as told is let in, and whatever was let in fits into any 60 seconds."""
    window, now = MinuteWindow(), 0.0
    taken: list[float] = []
    for pause, attempts in steps:
        now += pause
        for _ in range(attempts):
            seconds = window.wait(limit, now)
            if seconds:
                assert seconds <= 61
                assert window.wait(limit, now + seconds * 0.99) > 0
                # a sum of floats may fall short by its last digit
                now += seconds + 1e-6
                assert window.wait(limit, now) == 0
            window.add(1, now)
            taken.append(now)
    for moment in taken:
        assert sum(moment - 60 < other <= moment for other in taken) <= limit


def test_finding_a_key_among_many_is_quick() -> None:
    ring = KeyRing([ApiKey(f"sk-{number}", f"name-{number}") for number in range(1000)])
    started = time.perf_counter()
    assert all(ring.find([f"Bearer sk-{number}"]) is not None for number in range(100))
    assert time.perf_counter() - started < 0.5
