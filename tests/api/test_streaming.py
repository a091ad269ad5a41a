"""What goes over the wire of a stream: the events, their chunks, back-pressure, and what comes after it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.engine.request import GenerationRequest
from tests.api.conftest import Running, Serve
from tests.api.raw import post, read_answer
from tests.api.test_disconnects import split_chunks, wait_for
from tests.fakes import FakeEngine

RECORDED = json.loads(Path(__file__).with_name("recorded_events.json").read_text())
# our own server, and one that offers nothing but ASGI
SERVERS = {"direct": None, "asgi": HttpToolsProtocol}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def by_choice(events: list[str]) -> dict[str, list[str]]:
    """Events in order, sorted by the choice they belong to; choices may interleave in any way."""
    sorted_events: dict[str, list[str]] = {}
    for event in events:
        index = re.search(r'"index":(\d+)', event)
        sorted_events.setdefault(index[1] if index else "none", []).append(event)
    return sorted_events


def parse(data: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    *events, done, rest = data.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def choices_of(events: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


def texts(events: list[dict[str, Any]], index: int = 0) -> list[str]:
    return [choice["text"] for choice in choices_of(events, index)]


async def stream(server: Running, **fields: Any) -> list[dict[str, Any]]:
    return parse((await server.complete(stream=True, **fields)).content)


@pytest.mark.anyio
@pytest.mark.parametrize("http", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: json.dumps(recorded["request"]))
async def test_events_are_byte_for_byte_those_recorded(serve: Serve, recorded: dict[str, Any], http: Any) -> None:
    # recorded from the first version of the server, in which every token was its own task switch and write
    async with serve(http=http) as server:
        response = await server.client.post(
            "/v1/completions", json={**recorded["request"], "stream": True}, headers={"x-request-id": "recorded"}
        )
        text = re.sub(r'"created":\d+', '"created":0', response.text)
        events = re.sub(r'"fp_[0-9a-f]+"', '"fp"', text).split("\n\n")
        assert events.pop() == ""
        assert events[-1] == "data: [DONE]"
        assert by_choice(events) == by_choice(recorded["events"])


@pytest.mark.anyio
@pytest.mark.parametrize("http", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("n", [1, 3])
async def test_tokens_that_wait_leave_in_one_event(
    serve: Serve, engine: FakeEngine, n: int, logprobs: int | None, http: Any
) -> None:
    async with serve(http=http) as server:
        fields = {"prompt": ALPHABET, "n": n, "logprobs": logprobs, "max_tokens": 20}
        singly = await stream(server, **fields)
        engine.burst = 5
        together = await stream(server, **fields)
        for index in range(n):
            one, many = (
                [c for e in events for c in e["choices"] if c["index"] == index] for events in (together, singly)
            )
            assert [len(choice["text"]) for choice in one] == [5] * 4
            assert [len(choice["text"]) for choice in many] == [1] * 20
            assert "".join(texts(together, index)) == "".join(texts(singly, index))
            assert [choice["finish_reason"] for choice in one] == [None, None, None, "length"]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if logprobs is not None else ():
                joined = [value for choice in one for value in choice["logprobs"][name]]
                assert joined == [value for choice in many for value in choice["logprobs"][name]]


@pytest.mark.anyio
@pytest.mark.parametrize("burst", [1, 2, 3, 5])
async def test_characters_of_several_tokens(serve: Serve, engine: FakeEngine, burst: int) -> None:
    engine.burst = burst
    prompt = "Gr\u00fc\u00dfe \U0001f642 \u65e5\u672c"
    async with serve() as server:
        events = await stream(server, prompt=prompt, max_tokens=3 * len(prompt.encode()))
        assert "".join(texts(events)) == 3 * prompt
        assert not any("\ufffd" in text for text in texts(events))


@pytest.mark.anyio
@pytest.mark.parametrize("burst", [1, 4, 7, 50])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_among_tokens_that_wait(
    serve: Serve, engine: FakeEngine, burst: int, include: bool
) -> None:
    engine.burst = burst
    async with serve() as server:
        events = await stream(
            server,
            prompt=ALPHABET,
            stop=["klm", "xyz"],
            max_tokens=10**6,
            include_stop_str_in_output=include,
            stream_options={"include_usage": True},
        )
        assert "".join(texts(events)) == ("abcdefghijklm" if include else "abcdefghij")
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
        assert events[-2]["choices"][0]["stop_reason"] == "klm"
        assert events[-1]["usage"]["completion_tokens"] == 13
        await server.is_idle()


@asynccontextmanager
async def slow_client(server: Running, **fields: Any) -> AsyncIterator[socket.socket]:
    """A client with little room, which has asked for a stream and reads nothing."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", server.port))
        await loop.sock_sendall(sock, post({"prompt": ALPHABET, "stream": True, **fields}))
        yield sock


async def read_all(sock: socket.socket) -> bytes:
    """The body of a chunked answer, read to its end."""
    data = b""
    async with asyncio.timeout(20):
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += await asyncio.get_running_loop().sock_recv(sock, 2**20)
    return b"".join(split_chunks(data.partition(b"\r\n\r\n")[2]))


@pytest.mark.anyio
@pytest.mark.parametrize("http", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_slow_reader_gets_everything_in_fewer_events(
    serve: Serve, engine: FakeEngine, logprobs: int | None, http: Any
) -> None:
    # some 6 MB of events, of which connection and kernel hold 3
    num_tokens = 60_000 if logprobs is None else 30_000
    engine.burst = 2
    engine.script = lambda request, _: itertools.cycle(request.prompt_token_ids)
    async with serve(http=http) as server, slow_client(server, max_tokens=num_tokens, logprobs=logprobs) as sock:
        # all has been generated, though most of it could not leave
        await wait_for(lambda: engine.requests and not engine.live)
        assert len(server.context.open_requests) == 1
        events = parse(await read_all(sock))
        text = "".join(itertools.islice(itertools.cycle(ALPHABET), num_tokens))
        assert "".join(texts(events)) == text
        assert max(map(len, texts(events))) > 1000
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        if logprobs is not None:
            tokens = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
            assert "".join(tokens) == text
        await server.is_idle()


@pytest.mark.anyio
async def test_a_stop_string_is_found_though_nobody_reads(serve: Serve, engine: FakeEngine) -> None:
    engine.burst = 2

    def script(request: GenerationRequest, _: int) -> Iterator[int]:
        ids = request.prompt_token_ids
        return itertools.chain(itertools.islice(itertools.cycle(ids), 52_000), itertools.repeat(ids[0]))

    engine.script = script
    async with serve() as server, slow_client(server, max_tokens=10**9, stop="aaa") as sock:
        await wait_for(lambda: engine.aborted)
        assert len(server.context.open_requests) == 1
        events = parse(await read_all(sock))
        assert "".join(texts(events)) == ALPHABET * 2000
        assert events[-1]["choices"][0]["stop_reason"] == "aaa"
        await server.is_idle()


@pytest.mark.anyio
@pytest.mark.parametrize("http", SERVERS.values(), ids=SERVERS)
async def test_a_slow_reader_that_leaves_frees_its_row(serve: Serve, engine: FakeEngine, http: Any) -> None:
    engine.burst = 100
    engine.delay = 0.001
    async with serve(http=http) as server, slow_client(server, max_tokens=10**9, logprobs=5) as sock:
        await asyncio.sleep(0.5)
        assert engine.live
        sock.close()
        await server.is_idle()
        assert engine.aborted


@pytest.mark.anyio
async def test_a_slow_reader_is_told_of_an_engine_that_is_lost(serve: Serve, engine: FakeEngine) -> None:
    engine.burst = 100
    engine.delay = 0.001
    async with serve() as server, slow_client(server, max_tokens=10**9, logprobs=5) as sock:
        await asyncio.sleep(0.5)
        engine.die()
        *_, error, done, _ = (await read_all(sock)).decode().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
        assert done == "data: [DONE]"
        await server.is_idle()


@pytest.mark.anyio
async def test_two_hundred_and_fifty_six_streams(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.01
    async with serve(max_queue=1000) as server:

        async def ask(number: int) -> None:
            prompt = f"stream {number:03d}. "
            reader, writer = await server.connect()
            writer.write(post({"prompt": prompt, "max_tokens": 3 * len(prompt), "stream": True}))
            async with asyncio.timeout(30):
                data = await reader.readuntil(b"\r\n0\r\n\r\n")
            writer.close()
            events = parse(b"".join(split_chunks(data.partition(b"\r\n\r\n")[2])))
            assert "".join(texts(events)) == 3 * prompt

        await asyncio.gather(*(ask(number) for number in range(256)))
        await server.is_idle()


@pytest.mark.anyio
@pytest.mark.parametrize("http", SERVERS.values(), ids=SERVERS)
async def test_a_connection_serves_one_request_after_the_other(serve: Serve, engine: FakeEngine, http: Any) -> None:
    engine.delay = 0.002
    async with serve(http=http) as server:
        reader, writer = await server.connect()
        first, second = ({"prompt": prompt, "max_tokens": 8, "stream": True} for prompt in ("one", "two"))
        whole = {"prompt": "three", "max_tokens": 5}
        # all at once: none is answered before those before it
        writer.write(post(first) + post(second) + post(whole) + post(first))
        async with asyncio.timeout(5):
            for prompt in ("one", "two"):
                data = await reader.readuntil(b"\r\n0\r\n\r\n")
                assert data.startswith(b"HTTP/1.1 200")
                assert "".join(texts(parse(b"".join(split_chunks(data.partition(b"\r\n\r\n")[2]))))) == (3 * prompt)[:8]
            status, _, body = await read_answer(reader)
            assert (status, json.loads(body)["choices"][0]["text"]) == (200, "three")
            assert (await reader.readuntil(b"\r\n0\r\n\r\n")).count(b"data: ") == 9
        writer.close()
        await server.is_idle()


@pytest.mark.anyio
async def test_leaving_while_another_request_waits_on_the_connection(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.01
    async with serve() as server:
        _, writer = await server.connect()
        writer.write(post({"prompt": "one", "max_tokens": 10**6, "stream": True}) + post({"prompt": "two"}))
        await wait_for(lambda: engine.live)
        await asyncio.sleep(0.05)
        writer.close()
        await server.is_idle()
        assert len(engine.requests) == 1


@pytest.mark.anyio
async def test_a_short_answer_is_written_at_once(serve: Serve, engine: FakeEngine) -> None:
    engine.burst = 3
    async with serve() as server:
        for fields in ({"stream": True}, {"stream": False}):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, post({"prompt": "abc", "max_tokens": 3, **fields}))
                # head, events and end come with one read
                data = await loop.sock_recv(sock, 2**16)
            assert data.startswith(b"HTTP/1.1 200 OK\r\n")
            assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if fields["stream"] else b"}")
