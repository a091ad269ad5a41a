"""The engine process: ``python -m app.engine.process``, started and supervised by ``client``.

It loads the model, then turns commands into steps and steps into reports until it is told to stop or its parent is
gone. Importing this loads no torch: the process must be tied to its parent before anything slow happens.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec
import zmq

from app.engine import garbage
from app.engine.bare_import import import_for_serving
from app.engine.config import EngineConfig
from app.engine.early import AWAIT_ARGUMENTS
from app.engine.interface import EngineStartError
from app.engine.messages import (
    EXIT_START_FAILED,
    Abort,
    Arguments,
    Beat,
    Checked,
    Command,
    Ready,
    Report,
    StartFailed,
    Stop,
    Submit,
    pack_events,
)
from app.engine.readahead import read_ahead
from app.engine.request import EngineStats, Event, FinishReason, GenerationRequest, ModelInfo, TokenEvent
from app.engine.stages import stage

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
# between two looks at whether a grammar is compiled, while nothing else is to be done
COMPILE_CHECK_SECONDS = 0.002
PARENT_CHECK_SECONDS = 0.5
LINGER_MILLISECONDS = 2000

_PR_SET_PDEATHSIG = 1
_LOADING = "app.engine.loading"


class SteppingEngine(Protocol):
    """What the process asks of an engine; see ``engine.Engine``, which cannot be imported here."""

    @property
    def has_work(self) -> bool: ...

    @property
    def is_compiling(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...

    def submit(self, request: GenerationRequest) -> None: ...

    def abort(self, request_id: str, sample: int | None = None) -> None: ...

    def step(self) -> list[Event]: ...

    def take_admissions(self) -> list[tuple[str, float]]: ...

    def prepare_more(self) -> bool: ...

    def check_integrity(self) -> None: ...


# takes the settings and a function that is told the directory of the checkpoint once that has been checked
Loader = Callable[[EngineConfig, Callable[[str], None]], tuple[SteppingEngine, ModelInfo]]


class Channel:
    """The process's end of the socket. One thread at a time may use it."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MILLISECONDS)
        # queues are bounded where requests are admitted, not here
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[Command])

    def send(self, report: Report) -> None:
        self._socket.send(self._encoder.encode(report))

    def receive(self, timeout: float) -> list[Command]:
        """All commands that have arrived, after waiting at most ``timeout`` seconds for the first."""
        commands: list[Command] = []
        if not self._socket.poll(int(timeout * 1000)):
            return commands
        while True:
            try:
                commands += self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return commands

    def close(self) -> None:
        """Close after what was sent has left."""
        self._socket.close()
        self._context.term()


class Desk:
    """Between commands and the engine: knows the key of every live request."""

    def __init__(self, engine: SteppingEngine) -> None:
        self._engine = engine
        self._keys: dict[str, int] = {}
        self._num_unfinished: dict[str, int] = {}
        # when those came that wait
        self._arrivals: dict[str, float] = {}
        self._refusals: list[Event] = []

    @property
    def has_work(self) -> bool:
        return bool(self._refusals) or self._engine.has_work

    @property
    def patience(self) -> float:
        """Seconds that commands may be waited for while there is no work."""
        return COMPILE_CHECK_SECONDS if self._engine.is_compiling else BEAT_SECONDS

    def apply(self, command: Submit | Abort) -> None:
        if isinstance(command, Abort):
            self._engine.abort(command.request_id, command.sample)
        else:
            self._submit(command.key, command.request)

    def step(self) -> Report:
        """One step of the engine, as a report."""
        events, self._refusals = self._refusals, []
        events = events + self._engine.step()
        admitted = [(at, self._arrivals.pop(name, None)) for name, at in self._engine.take_admissions()]
        waits = [at - arrival for at, arrival in admitted if arrival is not None]
        report = pack_events(events, self._keys, self._engine.stats, waits)
        if report.rich:
            # ends are among them
            for event in events:
                if isinstance(event, TokenEvent) and event.finish_reason is not None:
                    self._finish_sample(event.request_id)
        return report

    def prepare_more(self) -> bool:
        """Use an idle moment; whether there may be a use for another."""
        return self._engine.prepare_more()

    def idle(self) -> Report:
        self._engine.check_integrity()
        return Beat(self._engine.stats)

    def _submit(self, key: int, request: GenerationRequest) -> None:
        self._keys[request.request_id] = key
        self._num_unfinished[request.request_id] = len(request.unfinished)
        if request.progress is None:
            self._arrivals[request.request_id] = time.monotonic()
        try:
            self._engine.submit(request)
        except ValueError as error:
            self._refusals += [
                TokenEvent(request.request_id, sample, None, finish_reason=FinishReason.ERROR, error=str(error))
                for sample in request.unfinished
            ]

    def _finish_sample(self, request_id: str) -> None:
        self._num_unfinished[request_id] -= 1
        if self._num_unfinished[request_id] == 0:
            del self._num_unfinished[request_id], self._keys[request_id]
            self._arrivals.pop(request_id, None)


def main(argv: Sequence[str] | None = None, load: Loader | None = None) -> int:
    """Run the process; returns its exit status. ``load`` replaces the loading of the engine in tests."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s engine: %(message)s", stream=sys.stderr)
    arguments = _read_arguments(argv or sys.argv[1:])
    if arguments is None:
        return 0
    channel = Channel(arguments.endpoint)
    read_ahead(arguments.config.model)
    try:
        with _beating(channel) as report:
            started = _start(arguments.config, report, load or _default_loader())
        if started is None:
            return EXIT_START_FAILED
        engine, info = started
        garbage.settle()
        channel.send(Ready(info, engine.stats))
        _serve(channel, Desk(engine))
        return 0
    finally:
        channel.close()


def _read_arguments(words: Sequence[str]) -> Arguments | None:
    """What the command line says, or what comes once the libraries are loaded; None when nobody wants an engine.

    The process is tied to its parent before either.
    """
    if words[0] != AWAIT_ARGUMENTS:
        arguments = Arguments.from_json(words[0])
        _tie_to_parent(arguments.parent_pid)
        return arguments
    _tie_to_parent(int(words[1]))
    _default_loader()
    line = sys.stdin.readline()
    return Arguments.from_json(line) if line else None


def _serve(channel: Channel, desk: Desk) -> None:
    """Drain the inbox, step, report: until told to stop.

    Without work it prepares for steps to come, bit by bit, and when that is done waits for commands and beats.
    """
    may_prepare = True
    while True:
        commands = channel.receive(0 if desk.has_work or may_prepare else desk.patience)
        for command in commands:
            if isinstance(command, Stop):
                return
            desk.apply(command)
        if desk.has_work:
            channel.send(desk.step())
            may_prepare = True
        else:
            may_prepare = desk.prepare_more()
            channel.send(desk.idle())


def _start(
    config: EngineConfig, report: Callable[[Report], None], load: Loader
) -> tuple[SteppingEngine, ModelInfo] | None:
    """Load the engine, or report in one line why that is impossible."""
    try:
        return load(config, lambda model_dir: report(Checked(model_dir)))
    except EngineStartError as error:
        report(StartFailed(_one_line(str(error))))
    except Exception as error:
        logger.exception("the engine could not be loaded")
        report(StartFailed(_one_line(f"the engine could not be loaded: {type(error).__name__}: {error}")))
    return None


def _default_loader() -> Loader:
    if _LOADING not in sys.modules:
        with stage("importing"):
            import_for_serving()
            importlib.import_module(_LOADING)
    from app.engine.loading import load_engine

    return load_engine


@contextmanager
def _beating(channel: Channel) -> Iterator[Callable[[Report], None]]:
    """Beat from a thread of its own, which has the channel to itself until the block ends."""
    outbox: queue.SimpleQueue[Report | None] = queue.SimpleQueue()

    def beat() -> None:
        while True:
            try:
                report = outbox.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                report = Beat()
            if report is None:
                return
            channel.send(report)

    thread = threading.Thread(target=beat, name="beats")
    thread.start()
    try:
        yield outbox.put
    finally:
        outbox.put(None)
        thread.join()


def _tie_to_parent(parent_pid: int) -> None:
    """Leave signals to the parent, and die when it dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # the parent may have died before the call above, and other systems have no such call
    threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True, name="parent").start()


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
