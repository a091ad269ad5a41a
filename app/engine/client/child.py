"""One engine process, the socket to it, and the notice of its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from app.engine.config import EngineConfig
from app.engine.early import EarlyProcess, environment
from app.engine.messages import EXIT_START_FAILED, Arguments, Command, Report

# messages read before the event loop gets its turn again
MAX_READS_AT_ONCE = 64
# commands that are sent without waiting for the end of the turn: the process begins with the first of many requests
# while the last are still being read
MAX_COMMANDS_HELD = 32

# how long the last words of a process may take from the kernel to the socket
LAST_WORDS_SECONDS = 0.2

# the path of a unix socket holds at most 107 bytes
_MAX_DIRECTORY_LENGTH = 90


class EngineChild:
    """A started process. Made and used on one event loop, where its callbacks run; dies with the thread of that loop.

    ``on_report`` gets each message, taken apart and as it came, ``on_exit`` the exit status (a negative signal number
    for a violent death) once, after the last message. Raises OSError when it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        config: EngineConfig,
        on_report: Callable[[Report, bytes], None],
        on_exit: Callable[[int], None],
        early: EarlyProcess | None = None,
    ) -> None:
        self._on_report = on_report
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._outbox: list[Command] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
        self._directory = _private_directory()
        self._is_connected = False
        endpoint = f"ipc://{self._directory}/engine"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # queues are bounded where requests are admitted, not here
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):
            self._socket.setsockopt(option, 0)
        self._socket.bind(endpoint)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._read)
        arguments = Arguments(endpoint, os.getpid(), config).to_json()
        try:
            self._process = (early and early.take(arguments)) or subprocess.Popen(
                [*command, arguments], stdin=subprocess.DEVNULL, env=environment()
            )
        except OSError:
            self._close()
            raise
        threading.Thread(target=self._wait, name="engine-exit", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Send together with others of this turn of the event loop. A process that is gone gets nothing."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(command)
        if len(self._outbox) == MAX_COMMANDS_HELD:
            self._send_held()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self, timeout: float) -> int | None:
        """The exit status, or None when the process is still there after ``timeout`` seconds."""
        done, _ = await asyncio.wait([self._exit], timeout=timeout)
        return self._exit.result() if done else None

    def _wait(self) -> None:
        status = self._process.wait()
        # the loop may have been closed without waiting for the process
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note_exit, status)

    def _note_exit(self, status: int) -> None:
        if status == EXIT_START_FAILED:
            self._loop.call_later(LAST_WORDS_SECONDS, self._finish, status)
        else:
            self._finish(status)

    def _finish(self, status: int) -> None:
        self._read(max_reads=None)
        self._close()
        self._exit.set_result(status)
        self._on_exit(status)

    def _close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _flush(self) -> None:
        self._send_held()
        # sending may have consumed the signal that messages wait to be read
        self._read()

    def _send_held(self) -> None:
        commands, self._outbox = self._outbox, []
        if commands and not self._socket.closed:
            with contextlib.suppress(zmq.Again):
                self._socket.send(self._encoder.encode(commands), zmq.NOBLOCK)

    def _read(self, max_reads: int | None = MAX_READS_AT_ONCE) -> None:
        num_reads = 0
        while not self._socket.closed:
            if num_reads == max_reads:
                self._loop.call_soon(self._read)
                return
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            num_reads += 1
            self._note_connection()
            self._on_report(self._decoder.decode(message), message)

    def _note_connection(self) -> None:
        # connected sockets need no path, and a directory that is gone already is left behind by no kind of death
        if not self._is_connected:
            self._is_connected = True
            shutil.rmtree(self._directory, ignore_errors=True)


def _private_directory() -> Path:
    """A fresh directory that only this user can enter, with a path short enough for a unix socket."""
    directory = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="mamba-", dir=directory if len(directory) < _MAX_DIRECTORY_LENGTH else "/tmp"))
