"""A server in a process of its own, and streams read from it in the background."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


class Process:
    """A server program, its output, and a client for it."""

    def __init__(self, arguments: list[str], port: int) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.url = f"http://127.0.0.1:{port}"
        self.ready_text = ""

    def wait_ready(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.ready_text += line
            if line.startswith("try:"):
                return
        raise AssertionError(self.ready_text + self.popen.communicate()[1])

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def wait(self, seconds: float) -> tuple[int, str]:
        """Exit code and what went to stderr."""
        _, errors = self.popen.communicate(timeout=seconds)
        return self.popen.returncode, errors

    def status(self, path: str) -> int:
        """Status of a GET; 0 when the connection is refused."""
        try:
            return httpx.get(self.url + path).status_code
        except httpx.ConnectError:
            return 0

    def kill(self) -> None:
        """End it if it still runs, and read what it said."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()

    def open_stream(self, max_tokens: int) -> Stream:
        return Stream(self.url, max_tokens)


class Stream(threading.Thread):
    """Reads one streamed completion in the background."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__()
        self._request = {"prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._url = url
        self.events: list[str] = []
        self.error: Exception | None = None
        self.has_begun = threading.Event()
        self.start()
        assert self.has_begun.wait(10)

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._request, timeout=20) as response:
                for line in response.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self.has_begun.set()
        except httpx.HTTPError as error:
            self.error = error
            self.has_begun.set()

    def finish(self) -> list[str]:
        """All events; the stream ended without being cut."""
        self.join(20)
        assert self.error is None
        assert self.events[-1] == "[DONE]"
        return self.events


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines_of(errors: str, level: str) -> list[str]:
    """Log lines of one level."""
    return [line for line in errors.splitlines() if f" {level} " in line]
