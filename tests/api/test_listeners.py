"""Connections that come together are taken together."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from app.main import several

pytestmark = pytest.mark.anyio

NUM_CONNECTIONS = 64


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The event loop that serves."""
    pytest.importorskip("uvloop")
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=NUM_CONNECTIONS) as listener:
        yield listener


async def num_turns(listeners: list[socket.socket]) -> int:
    """Turns of the event loop until all connections that wait are taken."""
    loop, taken = asyncio.get_running_loop(), list[asyncio.BaseTransport]()

    class Taking(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            taken.append(transport)

    with ExitStack() as stack:
        address = listeners[0].getsockname()
        for _ in range(NUM_CONNECTIONS):
            stack.enter_context(socket.create_connection(address))
        servers = [await loop.create_server(Taking, sock=each) for each in listeners]
        turns = 0
        while len(taken) < NUM_CONNECTIONS:
            turns += 1
            await asyncio.sleep(0)
        for server in servers:
            server.close()
        for transport in taken:
            transport.abort()
    return turns


async def test_many_connections_take_a_few_turns(listener: socket.socket) -> None:
    assert await num_turns(several(listener)) <= NUM_CONNECTIONS // 8


async def test_the_address_is_free_once_all_are_closed(listener: socket.socket) -> None:
    listeners = several(listener)
    port = listener.getsockname()[1]
    for each in listeners:
        each.close()
    with socket.create_server(("127.0.0.1", port)) as again:
        assert again.getsockname()[1] == port
