"""A real uvicorn on 127.0.0.1 over a fake engine, in the event loop of the test."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from app.api import ServerContext, create_app
from app.main import QuietServer, several, uvicorn_config
from app.metrics import ServerMetrics
from app.serving.chat_template import ChatTemplate, find_template
from app.serving.preparing import Target
from app.serving.tokenizer import Tokenizer
from app.settings import Settings
from tests.fakes import FakeEngine, make_info

MODEL = "acme/fox"
KEY = "sk-right"


def byte_backend() -> Backend:
    """One token per byte, and an end-of-text token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def byte_tokenizer_json() -> str:
    """What ``tokenizer.json`` holds for it."""
    return str(byte_backend().to_str())


@dataclass
class Running:
    """One server under test."""

    context: ServerContext
    engine: FakeEngine
    port: int
    client: httpx.AsyncClient
    answers: list[tuple[str, str, int]] = field(default_factory=list)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": "hello", **fields})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def slow_down_preparing(self, seconds: float) -> list[float]:
        """Let the work on each request that comes before the engine block so long; tells when each began."""
        service = self.context.service
        assert service is not None
        find_target = service.find_target
        begun: list[float] = []

        def slow(name: str | None) -> Target:
            begun.append(time.monotonic())
            time.sleep(seconds)
            return find_target(name)

        object.__setattr__(service, "find_target", slow)
        return begun

    async def is_idle(self) -> None:
        """Return once nothing holds a row, a place in the queue or an open request; fails by its time limit."""
        async with asyncio.timeout(2):
            while self.engine.live or self.context.admission.num_rows or len(self.context.open_requests):
                await asyncio.sleep(0.005)
        assert self.context.admission.num_waiting_tokens == 0


Serve = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_backend())


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(make_info(tokenizer.vocab_size, (256,)))


@pytest.fixture
def serve(engine: FakeEngine, tokenizer: Tokenizer) -> Serve:
    """Call with settings; ``is_loading`` leaves the model unloaded, ``http`` is another protocol class for uvicorn.

    ``template`` is that of conversations, ChatML if none is given, or None for a model without one.
    """
    chatml = make_template("chatml")

    @asynccontextmanager
    async def serve(
        *, is_loading: bool = False, http: Any = None, template: ChatTemplate | None = chatml, **settings: Any
    ) -> AsyncIterator[Running]:
        context = make_context(engine, **settings)
        if not is_loading:
            context.open_for_requests(tokenizer, template)
        async with listening(context, http) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            client.timeout = httpx.Timeout(20)
            yield Running(context, engine, port, client)

    return serve


def make_template(name: str) -> ChatTemplate:
    source = find_template(name)
    assert source is not None
    return ChatTemplate(source)


def make_context(engine: FakeEngine, **settings: Any) -> ServerContext:
    checked = Settings(**{"model": MODEL, **settings})
    return ServerContext(checked, engine, ServerMetrics(engine, checked.model_names[0], lambda: True))


@asynccontextmanager
async def listening(context: ServerContext, http: Any = None) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn_config(context.settings, context)
    config.http = http or config.http
    server = QuietServer(config)
    task = asyncio.create_task(server.serve(sockets=several(listener)))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


@pytest.fixture
def app_of(engine: FakeEngine) -> Callable[..., Any]:
    """The application alone, for what can be read off it."""
    return lambda **settings: create_app(make_context(engine, **settings))
