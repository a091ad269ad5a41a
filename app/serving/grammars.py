"""Grammars of requests, tried out before the engine hears of them."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict

from app.engine.grammars import GrammarError, check_size
from app.engine.request import Grammar
from app.serving.errors import InvalidRequest, ServerFailure
from app.serving.grammar_worker import READY

logger = logging.getLogger(__name__)

# grammars whose check is remembered, by a hash of a few bytes
MAX_REMEMBERED = 1024

TOO_COMPLEX = "the grammar is too complex"


class GrammarChecker:
    """Tells whether an output can be held to a grammar. Safe to use from several threads, which must not be the event
    loop's: the first check takes a few tenths of a second, and one of a hostile grammar a few seconds.

    Checks are made one after the other in a process of their own, which such a grammar may take down; the next check
    starts another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker_lock = threading.Lock()
        self._worker: _Worker | None = None
        # what is wrong with each, None where nothing is
        self._complaints: OrderedDict[bytes, str | None] = OrderedDict()

    def check(self, grammar: Grammar, param: str | None = None) -> None:
        """Raise InvalidRequest, for the field ``param``, unless the grammar can be used. Raises ServerFailure where
        that cannot be told.
        """
        try:
            check_size(grammar)
        except GrammarError as error:
            raise InvalidRequest(str(error), param=param) from None
        key = hashlib.sha256(f"{grammar.kind}:{grammar.source}".encode()).digest()
        is_known, complaint = self._recall(key)
        if not is_known:
            with self._worker_lock:
                # another thread may have asked for the same meanwhile
                is_known, complaint = self._recall(key)
                if not is_known:
                    complaint = self._try_out(grammar)
                    self._remember(key, complaint)
        if complaint is not None:
            raise InvalidRequest(complaint, param=param)

    def is_known(self, grammar: Grammar) -> bool:
        """Whether ``check`` would answer at once."""
        source = grammar.source.encode("utf-8", "surrogatepass")
        return self._recall(hashlib.sha256(grammar.kind.encode() + b":" + source).digest())[0]

    def close(self) -> None:
        """End the process; a later check starts another."""
        with self._worker_lock:
            self._drop()

    def _try_out(self, grammar: Grammar) -> str | None:
        if self._worker is None:
            self._worker = _Worker()
        try:
            return self._worker.ask(grammar)
        except _WorkerDied:
            logger.warning("a %s of %d characters was too complex", grammar.kind, len(grammar.source))
            self._drop()
            return TOO_COMPLEX
        except _WorkerFailed:
            logger.error("the process that tries grammars out does not start")
            self._drop()
            raise ServerFailure("structured output is not possible at the moment") from None

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _recall(self, key: bytes) -> tuple[bool, str | None]:
        with self._lock:
            if key not in self._complaints:
                return False, None
            self._complaints.move_to_end(key)
            return True, self._complaints[key]

    def _remember(self, key: bytes, complaint: str | None) -> None:
        with self._lock:
            self._complaints[key] = complaint
            if len(self._complaints) > MAX_REMEMBERED:
                self._complaints.popitem(last=False)


class _WorkerDied(Exception):
    """The process ended while it tried a grammar out."""


class _WorkerFailed(Exception):
    """The process has never been ready."""


class _Worker:
    """A process that runs ``grammar_worker``; it ends with this object, or when this process is gone."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "app.serving.grammar_worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._is_ready = False

    def ask(self, grammar: Grammar) -> str | None:
        """What is wrong with a grammar. Raises _WorkerDied or _WorkerFailed."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if not self._is_ready and process.stdout.readline() != READY.encode() + b"\n":
            raise _WorkerFailed
        self._is_ready = True
        try:
            process.stdin.write(json.dumps({"kind": grammar.kind, "source": grammar.source}).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise _WorkerDied
        complaint: str | None = json.loads(answer)
        return complaint

    def stop(self) -> None:
        """End the process."""
        self._finalizer()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    # waits as well, and closes the pipes
    process.communicate()
