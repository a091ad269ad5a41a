"""The running server: engine, application and HTTP listener, from start to a clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from prometheus_client import disable_created_metrics

from app.api import Phase, ServerContext, create_app
from app.api.protocol import ConnectionLimits, HttpProtocol
from app.banner import ready_text
from app.engine import garbage
from app.engine.config import EngineConfig
from app.engine.early import EarlyProcess
from app.engine.interface import EngineClient, EngineStartError
from app.logging import configure
from app.metrics import ServerMetrics
from app.serving.chat_template import ChatTemplate, TemplateError, load_template
from app.serving.errors import Unavailable
from app.serving.tokenizer import Tokenizer, TokenizerError
from app.serving.tokenizer_source import find_tokenizer
from app.settings import Settings, SettingsError

EXIT_OK = 0
EXIT_FAILED = 1

_KEEP_ALIVE_SECONDS = 75
_LAST_WORDS_SECONDS = 1.0
_STOP_SECONDS = 0.5
_BACKLOG = 2048
_OTHER_FILES = 256
# uvloop takes one connection from each listener in a turn of the event loop, and while many requests begin, turns are
# long; each that finds nothing to take costs a connection that comes alone some 4 us
_NUM_LISTENERS = 16

logger = logging.getLogger(__name__)


class StartError(Exception):
    """The server cannot start; the message is one line for the operator."""


class ManagedEngine(EngineClient, Protocol):
    """An engine client that this module starts and stops."""

    @property
    def model_dir(self) -> str: ...

    @property
    def fatal(self) -> asyncio.Future[Any]: ...

    async def start(self) -> None: ...

    async def wait_ready(self) -> None: ...

    async def stop(self, grace: float) -> None: ...


def run(
    settings: Settings,
    make_engine: Callable[[EngineConfig], ManagedEngine] | None = None,
    early: EarlyProcess | None = None,
) -> int:
    """Serve until a signal or a failure; the result is the exit code. ``early`` becomes the engine's process."""
    configure(settings.log_format, settings.log_level, settings.uvicorn_log_level)
    disable_created_metrics()  # type: ignore[no-untyped-call]
    _allow_open_files(settings.max_connections)
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        try:
            return runner.run(_serve(settings, make_engine or partial(_process_engine, early=early)))
        except (StartError, EngineStartError, TokenizerError, TemplateError) as error:
            logger.critical("cannot serve: %s", error)
            return EXIT_FAILED


def engine_config(settings: Settings) -> EngineConfig:
    """What the engine is told of the settings."""
    return EngineConfig(
        model=settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        quantization=settings.quantization,
        state_dtype=settings.state_dtype,
        device=settings.device,
        max_num_seqs=settings.max_num_seqs,
        prefill_budget=settings.prefill_budget,
        memory_fraction=settings.memory_fraction,
        num_threads=settings.num_threads,
        cuda_graphs=settings.cuda_graphs,
        tokenizer=settings.tokenizer,
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket with the address taken, but refusing connections until it listens. Raises StartError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


def several(listener: socket.socket) -> list[socket.socket]:
    """The same listener several times, so that connections that come together need not wait for each other's turns."""
    return [listener, *(listener.dup() for _ in range(_NUM_LISTENERS - 1))]


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _allow_open_files(num_connections: int) -> None:
    """Raise the process's own limit, within what the system allows, so that it does not come before ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + _OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


async def _serve(settings: Settings, make_engine: Callable[[EngineConfig], ManagedEngine]) -> int:
    with bind(settings.host, settings.port) as listener:
        engine = make_engine(engine_config(settings))
        server = Server(settings, engine, listener)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.on_signal)
        if settings.api_key_file is not None:
            loop.add_signal_handler(signal.SIGHUP, server.on_hangup)
        logger.info("starting", extra={"model": settings.model, "pid": os.getpid()})
        try:
            return await server.run()
        finally:
            await engine.stop(_STOP_SECONDS)


def _load_texts(settings: Settings, model_dir: str) -> tuple[Tokenizer, ChatTemplate | None]:
    """What makes tokens of texts and of conversations."""
    directory = find_tokenizer(settings.tokenizer or model_dir)
    return Tokenizer.from_dir(directory), load_template(settings.chat_template, directory, Path(model_dir))


def _process_engine(config: EngineConfig, early: EarlyProcess | None) -> ManagedEngine:
    from app.engine.client import ProcessEngineClient

    return ProcessEngineClient(config, early=early)


class Server:
    """One start, one service, one end.

    First signal: not ready at once, open requests finish within ``shutdown_timeout``, new ones get 503 while the port
    stays open for at least ``drain_delay``. Second signal: open requests are told and cut now.
    """

    def __init__(self, settings: Settings, engine: ManagedEngine, listener: socket.socket) -> None:
        self._settings = settings
        self._engine = engine
        self._listener = listener
        metrics = ServerMetrics(engine, settings.model_names[0], self._is_ready)
        self._context = ServerContext(settings, engine, metrics)
        self._http = QuietServer(uvicorn_config(settings, self._context))
        self._stop = asyncio.Event()
        self._abort = asyncio.Event()

    def on_signal(self) -> None:
        """SIGTERM or SIGINT came."""
        (self._abort if self._stop.is_set() else self._stop).set()

    def on_hangup(self) -> None:
        """SIGHUP came: the file of keys has changed. One that is wrong changes nothing."""
        try:
            keys = self._settings.read_api_keys()
        except SettingsError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        self._context.keys.replace(keys)
        logger.info("keys read again", extra={"num_keys": len(keys)})

    async def run(self) -> int:
        """From start to end. Raises EngineStartError, TokenizerError, StartError; the caller stops the engine."""
        if not await self._unless_ended(self._engine.start()):
            return EXIT_OK
        tokenizer, template = await asyncio.to_thread(_load_texts, self._settings, self._engine.model_dir)
        self._listen()
        http = asyncio.create_task(self._http.serve(sockets=several(self._listener)))
        try:
            return await self._work(tokenizer, template)
        finally:
            self._http.should_exit = True
            await http

    async def _work(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> int:
        try:
            if await self._unless_ended(self._engine.wait_ready()):
                garbage.settle()
                self._context.open_for_requests(tokenizer, template)
                self._announce()
                await self._unless_ended(asyncio.Event().wait())
        except EngineStartError as error:
            await self._interrupt(Unavailable("the engine was lost and cannot be started again"))
            logger.critical("the engine cannot run: %s", error)
            return EXIT_FAILED
        return await self._drain()

    async def _unless_ended(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Whether the work got done before a signal came. Raises what it raises, and why the engine is lost."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop, self._engine.fatal}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            if self._engine.fatal.done():
                raise _fatal_error(self._engine.fatal)
            return False
        finally:
            for future in (task, stop):
                future.cancel()
                with suppress(asyncio.CancelledError, EngineStartError):
                    await future

    async def _drain(self) -> int:
        context = self._context
        context.phase = Phase.DRAINING
        logger.info("draining", extra={"num_open_requests": len(context.open_requests)})
        started = asyncio.get_running_loop().time()
        await self._unless_aborted(context.open_requests.wait_idle(), self._settings.shutdown_timeout)
        if len(context.open_requests):
            await self._interrupt(Unavailable("the server is shutting down"))
        passed = asyncio.get_running_loop().time() - started
        await self._unless_aborted(asyncio.Event().wait(), self._settings.drain_delay - passed)
        return EXIT_FAILED if self._abort.is_set() else EXIT_OK

    async def _unless_aborted(self, work: Coroutine[Any, Any, Any], timeout: float) -> None:
        tasks = {asyncio.ensure_future(work), asyncio.ensure_future(self._abort.wait())}
        await asyncio.wait(tasks, timeout=max(0.0, timeout), return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _interrupt(self, reason: Unavailable) -> None:
        """Tell every open request why it ends."""
        self._context.phase = Phase.DRAINING
        self._context.open_requests.interrupt_all(reason)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._context.open_requests.wait_idle(), _LAST_WORDS_SECONDS)

    def _is_ready(self) -> bool:
        return self._context.find_obstacle() is None

    def _listen(self) -> None:
        try:
            self._listener.listen(_BACKLOG)
        except OSError as error:
            raise StartError(f"cannot listen on port {self._settings.port}: {error.strerror or error}") from None

    def _announce(self) -> None:
        text = ready_text(self._settings, self._engine.info, self._listener.getsockname()[1])
        print(text, flush=True)  # noqa: T201 (the line that an operator waits for)


class QuietServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: those close the listener at the first signal."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def uvicorn_config(settings: Settings, context: ServerContext) -> uvicorn.Config:
    """How HTTP is spoken; also what tests serve with."""
    limits = ConnectionLimits(settings.header_timeout, settings.max_connections)
    return uvicorn.Config(
        create_app(context),
        http=partial(HttpProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )


def _fatal_error(fatal: asyncio.Future[Any]) -> EngineStartError:
    error = fatal.exception()
    return error if isinstance(error, EngineStartError) else EngineStartError(str(error or fatal.result()))
