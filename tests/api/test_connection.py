"""The order of bytes on a connection, whichever way they take, and what is written when it must not be."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from app.api.connection import Connection, find_connection, offer_connection
from app.api.corked import CorkedTransport

pytestmark = pytest.mark.anyio


class Wire:
    """A transport that keeps its writes."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.writes.append(data)

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed


def cork(wire: Wire) -> CorkedTransport:
    return CorkedTransport(wire, asyncio.get_running_loop())  # type: ignore[arg-type]


async def test_writes_of_one_turn_leave_together_and_in_order() -> None:
    wire = Wire()
    corked = cork(wire)
    corked.write_now(b"1")
    corked.write(b"2")
    corked.write(b"3")
    corked.write_now(b"4")
    assert wire.writes == [b"1"]
    await asyncio.sleep(0)
    assert wire.writes == [b"1", b"234"]
    corked.write_now(b"5")
    corked.write(b"6")
    corked.close()
    assert wire.writes == [b"1", b"234", b"5", b"6"]
    assert wire.is_closed
    await asyncio.sleep(0)
    assert len(wire.writes) == 4


async def test_what_was_gathered_is_lost_with_the_connection() -> None:
    wire = Wire()
    corked = cork(wire)
    corked.write(b"1")
    corked.abort()
    await asyncio.sleep(0)
    assert wire.writes == []


def make_cycle(chunked_encoding: bool | None = True) -> Any:
    flow = SimpleNamespace(write_paused=False, resume_reading=lambda: None)
    return SimpleNamespace(chunked_encoding=chunked_encoding, flow=flow)


def make(wire: Wire, *, chunked_encoding: bool | None = True) -> tuple[Connection, Any]:
    owner: Any = SimpleNamespace(corked=cork(wire), attended=None, is_lost=False)
    return Connection(owner, make_cycle(chunked_encoding)), owner


async def test_chunks_are_framed() -> None:
    wire = Wire()
    connection, _ = make(wire)
    assert connection.open(lambda _: None)
    connection.write(b"data: x" * 10)
    assert wire.writes == [b"46\r\n" + b"data: x" * 10 + b"\r\n"]


async def test_nothing_is_written_before_the_head_after_the_end_or_to_nobody() -> None:
    wire = Wire()
    connection, owner = make(wire)
    connection.write(b"early")
    connection.open(lambda _: None)
    owner.is_lost = True
    connection.write(b"lost")
    owner.is_lost = False
    connection.close()
    connection.write(b"late")
    assert wire.writes == []


@pytest.mark.parametrize("chunked_encoding", [None, False])
async def test_an_answer_without_chunks_has_no_direct_body(chunked_encoding: bool | None) -> None:
    wire = Wire()
    connection, _ = make(wire, chunked_encoding=chunked_encoding)
    assert not connection.open(lambda _: None)
    connection.write(b"x")
    assert wire.writes == []


async def test_a_client_that_has_gone_already_is_told_at_once() -> None:
    connection, owner = make(Wire())
    owner.is_lost = True
    told: list[int] = []
    connection.watch(lambda: told.append(1))
    assert told == [1]


async def test_closing_leaves_the_next_request_its_news() -> None:
    first, owner = make(Wire())
    second = Connection(owner, make_cycle())
    first.watch(lambda: None)
    second.watch(lambda: None)
    first.close()
    assert owner.attended is second
    second.close()
    assert owner.attended is None


async def test_a_connection_is_found_where_it_was_offered() -> None:
    connection, _ = make(Wire())
    scope: dict[str, Any] = {}
    assert find_connection(scope) is None
    offer_connection(scope, connection)
    assert find_connection(scope) is connection
