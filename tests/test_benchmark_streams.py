"""The streaming client counts the same events however they are cut, and tells what a long prompt costs the others."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import serve
from benchmarks.streams import Load, Outcome, StreamClient, allow_open_files, run

LOAD = Load("127.0.0.1", 1, None, "m", 4, 4, 8, 5, 250, 0.0, 0)
EVENT = b'data: {"choices":[{"index":0,"text":"data: \\n\\ndata: "}]}\n\n'
PING = b": ping\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":6}}\n\ndata: [DONE]\n\n'


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


ANSWER = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(
    map(chunk, (EVENT, PING, EVENT + EVENT, EVENT, USAGE, b""))
)


class Wire(asyncio.Transport):
    """A transport that answers what is written with bytes cut in pieces."""

    def __init__(self, client: StreamClient, pieces: list[bytes]) -> None:
        super().__init__()
        self.client, self.pieces = client, pieces

    def is_closing(self) -> bool:
        return False

    def write(self, _data: object) -> None:
        for piece in self.pieces:
            self.client.data_received(piece)


def receive(pieces: list[bytes]) -> Outcome:
    async def ask() -> Outcome:
        client, outcome = StreamClient(), Outcome()
        client.connection_made(Wire(client, pieces))
        await client.run(b"", outcome)
        return outcome

    return run(ask())


@given(st.sets(st.integers(1, len(ANSWER) - 1)))
def test_events_are_counted_however_they_are_cut(cuts: set[int]) -> None:
    ends = [*sorted(cuts), len(ANSWER)]
    outcome = receive([ANSWER[start:end] for start, end in zip([0, *ends], ends, strict=False)])
    # the events whose first token is asked for, and three more, with six tokens in them
    assert (len(outcome.first_tokens), len(outcome.gaps), outcome.num_tokens) == (1, 3, 6)


def test_a_refusal_is_told() -> None:
    with pytest.raises(ConnectionError, match="too many requests"):
        receive([b"HTTP/1.1 429 Too Many Requests\r\n\r\ntoo many requests"])
    failed = ANSWER.replace(chunk(USAGE), chunk(b'data: {"error":{"message":"lost"}}\n\ndata: [DONE]\n\n'))
    with pytest.raises(ConnectionError, match="lost"):
        receive([failed])


def test_steady_rate_leaves_out_beginning_and_end() -> None:
    slow, fast = Outcome(), Outcome()
    # one token a second; ten a second from 4 to 6, in events of two tokens
    slow.add_stream(0.0, [float(second) for second in range(1, 11)], 20)
    fast.add_stream(0.0, [4.05 + 0.1 * step for step in range(20)], 40)
    slow.add(fast)
    assert slow.steady_from == pytest.approx(4.05)
    assert slow.steady_until == pytest.approx(5.95)
    # 30 events of two tokens: from the 8th, at 4.35, to the 23rd, at 5.75
    assert slow.steady_tokens_per_s() == pytest.approx(2 * 15 / 1.4)
    assert Outcome().steady_tokens_per_s() is None


def test_gaps_before_and_beside_an_intruder() -> None:
    streams = Outcome(steady_from=1.0, steady_until=9.0)
    streams.gap_ends = array("d", [0.9, 2.0, 3.0, 4.5, 6.0, 7.0])
    streams.gaps = array("d", [0.8, 0.1, 0.2, 1.5, 1.2, 0.3])
    seen = Outcome(first_tokens=[2.0], started=3.5)
    line = serve.report_intruder(serve.intruder_of(LOAD, 99), seen, streams)
    assert (line["prompt_tokens"], line["ttft_ms"], line["outlived_streams"]) == (99, 2000.0, False)
    assert line["gaps_before_ms"]["worst"] == 200.0
    assert (line["num_gaps_beside"], line["gaps_beside_ms"]["worst"]) == (2, 1500.0)
    assert "refused" in serve.report_intruder(LOAD, Outcome(errors=["refused"]), streams)["first_error"]


def test_open_files_beyond_what_the_system_allows_are_an_error() -> None:
    allow_open_files(1)
    with pytest.raises(OSError, match="open files"):
        allow_open_files(2**40)


class Recitation(asyncio.Protocol):
    """A server's end that streams as many tokens as are asked for, one every two milliseconds."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._request = transport, b""

    def data_received(self, data: bytes) -> None:
        self._request += data
        head, _, body = self._request.partition(b"\r\n\r\n")
        if len(body) == int(re.search(rb"Content-Length: (\d+)", head)[1]):  # type: ignore[index]
            self._request = b""
            self._transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
            self._recite(json.loads(body)["max_tokens"], 0)

    def _recite(self, num_tokens: int, index: int) -> None:
        if index < num_tokens:
            self._transport.write(chunk(EVENT))
            asyncio.get_running_loop().call_later(0.002, self._recite, num_tokens, index + 1)
        else:
            self._transport.write(chunk(USAGE.replace(b":6}", b":%d}" % num_tokens)) + chunk(b""))


@pytest.fixture
def port() -> Iterator[int]:
    """Of a reciting server on a loop of its own."""
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    ports: list[int] = []

    async def listen() -> None:
        server = await asyncio.get_running_loop().create_server(Recitation, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        loops.append(asyncio.get_running_loop())
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(listen(),))
    thread.start()
    assert ready.wait(10)
    yield ports[0]
    loops[0].call_soon_threadsafe(stop.set)
    thread.join()


def test_an_intruder_from_the_command_line(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", f"http://127.0.0.1:{port}", "--model", "m", "--concurrency", "3", "--num-requests", "3"]
    options += ["--max-tokens", "150", "--processes", "2", "--intruder-tokens", "300", "--intruder-after", "0.1"]
    assert serve.main(options) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["num_requests"], line["num_tokens"], line["intruder"]["prompt_tokens"]) == (3, 450, 300)
    assert line["inter_token_ms"]["p50"] >= 2
    assert 100 < line["steady_tokens_per_s"] <= 1500
    assert line["intruder"]["gaps_before_ms"]["p50"] >= 2
