"""An engine process started before anybody knows what it will serve, so that its libraries load beside the API's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import app

ENGINE_COMMAND = (sys.executable, "-m", "app.engine.process")
# in place of the arguments: they come as one line on the standard input. The pid of the parent follows
AWAIT_ARGUMENTS = "--await-arguments"
# what tells OpenMP's threads how to wait, and looks that cost nothing where nobody else wants the cores
_WAITING = frozenset({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
_NUM_SPINS = 5_000
# how many products of matrices oneDNN and torch keep compiled, one for each number of rows
_NUM_PRODUCTS = 64


class EarlyProcess:
    """A process that loads what every engine needs and then waits for its arguments; it dies with its parent.

    One that cannot be started is none: who takes it starts another, and tells what is wrong.
    """

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        words = [*command, AWAIT_ARGUMENTS, str(os.getpid())]
        with suppress(OSError):
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, env=environment())

    def take(self, arguments: str) -> subprocess.Popen[bytes] | None:
        """The process, on its way with these arguments. None when it is gone or has been taken before."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        try:
            process.stdin.write(arguments.encode() + b"\n")
            process.stdin.close()
        except OSError:
            _end(process)
            return None
        return process

    def discard(self) -> None:
        """End the process unless it has been taken."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds the same ``app`` wherever it is started from.

    Unless the operator decided, its OpenMP threads soon stop to look for work. By default they keep their cores for
    milliseconds; measured on two cores of which another process wants one, a prompt then takes five times as long.

    Nor do its products stay compiled for every length of prompt that there ever was: that is 0.6 MiB each in bf16, of
    which the libraries keep 1024. Measured, it takes 0.3 ms to compile one again.
    """
    root = str(Path(app.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    waiting = {} if _WAITING & os.environ.keys() else {"GOMP_SPINCOUNT": str(_NUM_SPINS)}
    products = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(_NUM_PRODUCTS))
    return {**products, **os.environ, **waiting, "PYTHONPATH": os.pathsep.join(paths)}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
