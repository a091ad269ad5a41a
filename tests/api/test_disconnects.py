"""A client that leaves, or never reads, frees its row at once: in every phase, streaming or not."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable

import pytest

from app.api.streaming import PING
from tests.api.conftest import Serve
from tests.api.raw import post, reset
from tests.fakes import FakeEngine

Leave = Callable[[asyncio.StreamWriter], None]
LEAVES: dict[str, Leave] = {
    "close": lambda writer: writer.close(),
    "reset": reset,
    "half-close": lambda writer: writer.write_eof(),
}


async def wait_for(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.anyio
@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("phase", ["waiting", "decoding"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_leaving_frees_the_row(serve: Serve, engine: FakeEngine, stream: bool, phase: str, leave: Leave) -> None:
    # before its first event a request is queued or in prefill: the same wait as seen from here
    engine.delay = 60.0 if phase == "waiting" else 0.005
    async with serve() as server:
        _, writer = await server.connect()
        writer.write(post({"prompt": "hello", "max_tokens": 10**6, "stream": stream, "n": 2}))
        await wait_for(lambda: engine.live)
        if phase == "decoding":
            await asyncio.sleep(0.05)
        leave(writer)
        await server.is_idle()
        assert sorted(sample for _, sample in engine.aborted) == [0, 1]
        page = (await server.client.get("/metrics")).text
        assert 'mamba_requests_finished_total{reason="abort"} 1.0' in page
        assert 'status="499"' in page or stream
        writer.close()


@pytest.mark.anyio
async def test_leaving_while_the_prompt_is_tokenized(serve: Serve, engine: FakeEngine) -> None:
    async with serve() as server:
        begun = server.slow_down_preparing(0.3)
        _, writer = await server.connect()
        writer.write(post({"prompt": "hello " * 2000, "stream": True}))
        await wait_for(lambda: begun)
        writer.close()
        await server.is_idle()
        await asyncio.sleep(0.4)
        assert not engine.requests


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_leaving_after_a_body_that_came_in_one_large_piece(
    serve: Serve, engine: FakeEngine, stream: bool
) -> None:
    engine.delay = 60.0
    head, _, body = post({"prompt": [97] * 25_000, "stream": stream}).partition(b"\r\n\r\n")
    async with serve() as server:
        # a socket that blocks the loop: all of the body is there when the server reads on
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
            client.sendall(head + b"\r\n\r\n")
            await asyncio.sleep(0.1)
            client.sendall(body)
            await wait_for(lambda: engine.live)
        await server.is_idle()


@pytest.mark.anyio
async def test_leaving_with_half_a_body(serve: Serve, engine: FakeEngine) -> None:
    async with serve() as server:
        _, writer = await server.connect()
        writer.write(post(b'{"prompt":', length=100))
        await asyncio.sleep(0.05)
        writer.close()
        await server.is_idle()
        assert not engine.requests


@pytest.mark.anyio
async def test_two_hundred_leave_and_nothing_stays(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.002
    async with serve() as server:
        num_tasks = len(asyncio.all_tasks())

        async def come_and_go(number: int) -> None:
            _, writer = await server.connect()
            writer.write(post({"prompt": "hello", "max_tokens": 10**6, "stream": number % 2 == 0}))
            await asyncio.sleep(0.001 * (number % 20))
            reset(writer)

        for start in range(0, 200, 20):
            await asyncio.gather(*(come_and_go(number) for number in range(start, start + 20)))
        await server.is_idle()
        await wait_for(lambda: len(asyncio.all_tasks()) <= num_tasks)
        assert (await server.complete(max_tokens=5)).json()["choices"][0]["text"] == "hello"


@pytest.mark.anyio
async def test_pings_while_nothing_is_sent(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.5
    async with serve(ping_interval=0.1) as server:
        response = await server.complete(max_tokens=2, stream=True)
        events = response.text.split("\n\n")
        assert events.count(PING.decode().strip()) in range(4, 12)
        assert events[0] == PING.decode().strip()
        assert events[-2] == "data: [DONE]"


@pytest.mark.anyio
async def test_no_pings_while_tokens_come(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.02
    async with serve(ping_interval=0.2) as server:
        response = await server.complete(max_tokens=30, stream=True)
        assert PING.decode() not in response.text


@pytest.mark.anyio
async def test_payloads_that_wait_leave_in_one_chunk(serve: Serve, engine: FakeEngine) -> None:
    engine.burst = 1
    async with serve() as server:
        reader, writer = await server.connect()
        writer.write(post({"prompt": "hello", "max_tokens": 4, "n": 3, "stream": True}))
        async with asyncio.timeout(5):
            data = await reader.readuntil(b"[DONE]\n\n")
        writer.close()
        chunks = split_chunks(data.partition(b"\r\n\r\n")[2])
        # three choices per step share one write, the last ones with the end
        assert [chunk.count(b"data: ") for chunk in chunks] == [3, 3, 3, 4]


def split_chunks(data: bytes) -> list[bytes]:
    chunks = []
    while data:
        size, _, data = data.partition(b"\r\n")
        chunks.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return chunks


@pytest.mark.anyio
async def test_a_client_that_never_reads_is_cut(serve: Serve, engine: FakeEngine) -> None:
    engine.script = lambda request, _: itertools.cycle(request.prompt_token_ids)
    # some 100 KiB a batch, so that the socket's buffers are soon full
    engine.burst = 200
    async with serve(write_timeout=1.0) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        request = post({"prompt": "hello", "max_tokens": 10**8, "stream": True, "logprobs": 20})
        await asyncio.get_running_loop().sock_sendall(sock, request)
        await wait_for(lambda: engine.live)
        engine.delay = 0.01
        assert (await server.client.get("/livez")).status_code == 200
        assert engine.live, "others were answered only after the stuck client was cut"
        await wait_for(lambda: not engine.live)
        await server.is_idle()
        sock.close()
