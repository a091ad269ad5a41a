"""A request that takes longer than its client or the operator allows: told so, and its rows freed."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time

import openai
import pytest

from tests.api.conftest import MODEL, Serve
from tests.api.raw import exchange, post
from tests.api.test_disconnects import wait_for
from tests.api.test_errors import check_error
from tests.fakes import FakeEngine


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("asked", "allowed"), [("0.2", 0), (None, 0.2), ("60", 0.2), ("0.2", 60)])
async def test_nothing_came_in_time(
    serve: Serve, engine: FakeEngine, asked: str | None, allowed: float, stream: bool
) -> None:
    engine.delay = 60.0
    headers = {} if asked is None else {"x-request-timeout": asked}
    async with serve(max_request_seconds=allowed) as server:
        started = time.monotonic()
        body = {"prompt": "hello", "stream": stream, "n": 2}
        response = await server.client.post("/v1/completions", json=body, headers=headers)
        assert 0.2 <= time.monotonic() - started < 3
        assert response.status_code == 408
        error = check_error(response.headers, response.content, "timeout_error")
        assert (error["code"], "0.2 seconds" in error["message"]) == ("deadline_exceeded", True)
        await server.is_idle()
        assert sorted(sample for _, sample in engine.aborted) == [0, 1]


@pytest.mark.anyio
async def test_a_stream_that_has_begun_ends_with_an_event(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.01
    async with serve() as server:
        body = {"prompt": "hello", "stream": True, "max_tokens": 10**6}
        response = await server.client.post("/v1/completions", json=body, headers={"x-request-timeout": "0.3"})
        assert response.status_code == 200
        *chunks, last, done, rest = response.text.split("\n\n")
        assert len(chunks) > 3
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert (done, rest) == ("data: [DONE]", "")
        await server.is_idle()
        assert (await server.complete(max_tokens=1)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("seconds", ["0.1", "0.0000001"])
async def test_time_for_the_body_counts(serve: Serve, seconds: str) -> None:
    async with serve(body_timeout=60) as server:
        request = post(b"{", f"X-Request-Timeout: {seconds}", length=100)
        status, headers, body = await exchange(server.port, request)
        assert status == 408
        assert check_error(headers, body, "timeout_error")["code"] == "deadline_exceeded"
        assert headers["x-should-retry"] == "false"


@pytest.mark.anyio
async def test_the_operators_limit_for_bodies_stays_what_it_is(serve: Serve) -> None:
    async with serve(body_timeout=0.1, max_request_seconds=60) as server:
        status, headers, body = await exchange(server.port, post(b"{", "X-Request-Timeout: 30", length=100))
        assert status == 408
        assert "body" in check_error(headers, body, "timeout_error")["message"]


@pytest.mark.anyio
async def test_who_is_in_time_notices_nothing(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.005
    async with serve(max_request_seconds=30) as server:
        for stream in (False, True):
            body = {"prompt": "hello", "stream": stream, "max_tokens": 4}
            response = await server.client.post("/v1/completions", json=body, headers={"x-request-timeout": "30"})
            assert response.status_code == 200
            assert "error" not in response.text
        await server.is_idle()
        assert engine.aborted == []


@pytest.mark.anyio
@pytest.mark.parametrize("value", ["", "0", "0.0", "-1", "soon", "nan", "inf", "1e3", "1s", "1 2", "٣"])
async def test_a_wrong_value_is_refused(serve: Serve, engine: FakeEngine, value: str) -> None:
    async with serve() as server:
        # the body never comes, and the answer does not wait for it
        head = post(b"", length=100).replace(b"\r\n\r\n", b"\r\nX-Request-Timeout: " + value.encode() + b"\r\n\r\n")
        status, headers, body = await exchange(server.port, head)
        assert status == 400
        assert "X-Request-Timeout" in check_error(headers, body)["message"]
        assert engine.requests == []


@pytest.mark.anyio
@pytest.mark.parametrize("value", ["1" * 10, "9" * 1000, "5.0", "007"])
async def test_any_number_of_seconds_is_taken(serve: Serve, value: str) -> None:
    async with serve() as server:
        headers = {"x-request-timeout": value}
        for stream in (False, True):
            body = {"prompt": "x", "max_tokens": 1, "stream": stream}
            response = await server.client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text


@pytest.mark.anyio
async def test_two_values_are_refused(serve: Serve) -> None:
    async with serve() as server:
        request = post({"prompt": "x"}, "X-Request-Timeout: 1", "X-Request-Timeout: 2")
        assert (await exchange(server.port, request))[0] == 400


@pytest.mark.anyio
async def test_the_official_client_does_not_try_again(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 60.0
    async with serve() as server:
        url, headers = f"http://127.0.0.1:{server.port}/v1", {"X-Request-Timeout": "0.1"}
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=2) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.completions.create(model=MODEL, prompt="x", extra_headers=headers)
        assert caught.value.status_code == 408
        assert len(engine.requests) == 1


@pytest.mark.anyio
async def test_the_deadline_passes_while_the_prompt_is_tokenized(serve: Serve, engine: FakeEngine) -> None:
    async with serve() as server:
        server.slow_down_preparing(0.5)
        body, headers = {"prompt": "hello " * 2000}, {"x-request-timeout": "0.1"}
        started = time.monotonic()
        response = await server.client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 408
        assert time.monotonic() - started < 0.45
        await server.is_idle()
        await asyncio.sleep(0.5)
        assert engine.requests == []


@pytest.mark.anyio
async def test_a_client_that_reads_nothing_is_cut_at_the_deadline(serve: Serve, engine: FakeEngine) -> None:
    engine.script = lambda request, _: itertools.cycle(request.prompt_token_ids)
    engine.burst = 200
    async with serve(write_timeout=60, max_request_seconds=0.5) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        await loop.sock_sendall(sock, post({"prompt": "hello", "max_tokens": 10**8, "stream": True, "logprobs": 20}))
        await wait_for(lambda: engine.live)
        engine.delay = 0.01
        await wait_for(lambda: not engine.live)
        await server.is_idle()
        sock.close()
