"""Seconds from the start of the server's process to an open port, a ready engine and a first token.

The first start finds an empty directory for Triton's compiled kernels, the others find what it left there. Weights are
read once before every start, so that they come from the page cache.

    python -m benchmarks.start --model /tmp/random-2.8b --starts 3
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.01
_STAGE = re.compile(r"engine: (.+) took ([\d.]+) s$")
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*([\w]+)")
_PROMPT_TOKENS = 32


@dataclass
class Start:
    """One start. Seconds since the process began; ``stages`` are the durations the engine tells of."""

    stages: dict[str, float] = field(default_factory=dict)
    port_open: float = 0.0
    ready: float = 0.0
    first_token: float = 0.0
    first_answer: float = 0.0
    second_answer: float = 0.0

    def describe(self) -> dict[str, Any]:
        """Everything in seconds, the answers in milliseconds after they were asked for."""
        return {
            "port_open_s": round(self.port_open, 2),
            "ready_s": round(self.ready, 2),
            "first_token_s": round(self.first_token, 2),
            "first_answer_ms": round(1e3 * self.first_answer, 1),
            "second_answer_ms": round(1e3 * self.second_answer, 1),
            "stages_s": self.stages,
        }


class Server:
    """A server process whose log is read while it starts."""

    def __init__(self, options: argparse.Namespace, triton_cache: Path) -> None:
        self.port = free_port()
        command = [
            sys.executable,
            "-m",
            "app",
            options.model,
            "--port",
            str(self.port),
            "--device",
            options.device,
            "--disable-access-log",
        ]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(triton_cache)}
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *options.server_args],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.stages: dict[str, float] = {}
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def age(self) -> float:
        return time.perf_counter() - self.started

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def wait_for_port(self, limit: float) -> float:
        """Seconds until connections are taken. Raises SystemExit as ``wait_until_ready`` does."""
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self.age
            self._wait(limit)

    def wait_until_ready(self, limit: float) -> float:
        """Seconds until /readyz says so. Raises SystemExit when the server ends or takes longer than ``limit``."""
        while self._status() != 200:
            self._wait(limit)
        return self.age

    def _status(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def _wait(self, limit: float) -> None:
        if self.process.poll() is not None or self.age > limit:
            raise SystemExit(f"the server is not ready after {self.age:.1f} s:\n" + "".join(self.log[-20:]))
        time.sleep(_POLL_SECONDS)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if match := _STAGE.search(line.rstrip()):
                self.stages[match[1]] = self.stages.get(match[1], 0.0) + float(match[2])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(options: argparse.Namespace, triton_cache: Path) -> Iterator[Server]:
    server = Server(options, triton_cache)
    try:
        yield server
    finally:
        server.stop()


def first_event(port: int) -> float:
    """Seconds from asking for a streamed completion to its first event."""
    body = {"prompt": list(range(1, _PROMPT_TOKENS + 1)), "max_tokens": 2, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    line = response.readline()
    seconds = time.perf_counter() - started
    response.read()
    connection.close()
    if response.status != 200 or not line.startswith(b"data: {") or line.startswith(b'data: {"error"'):
        raise SystemExit(f"the first completion failed: {response.status} {line[:200]!r}")
    return seconds


def measure_start(options: argparse.Namespace, triton_cache: Path) -> Start:
    read_weights(Path(options.model))
    with running(options, triton_cache) as server:
        start = Start(port_open=server.wait_for_port(options.limit), ready=server.wait_until_ready(options.limit))
        asked = server.age
        start.first_answer = first_event(server.port)
        start.first_token = asked + start.first_answer
        start.second_answer = first_event(server.port)
        start.stages = server.stages
    return start


def read_weights(directory: Path) -> None:
    """Bring the weights of a checkpoint into the page cache."""
    buffer = bytearray(2**24)
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.bin")]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure_imports() -> dict[str, float]:
    """Seconds that importing the engine takes, by package; the interpreter's own bookkeeping makes them larger."""
    command = [sys.executable, "-X", "importtime", "-c", "import app.engine.loading"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    seconds: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        if match := _IMPORT.match(line):
            seconds[match[2]] += int(match[1]) / 1e6
    largest = sorted(seconds.items(), key=lambda item: -item[1])
    return {name: round(value, 2) for name, value in largest if value >= 0.02} | {
        "all": round(sum(seconds.values()), 2)
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--starts", type=int, default=3, help="the first has an empty Triton cache")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a start has failed")
    parser.add_argument("--imports", action="store_true", help="tell what importing takes as well")
    parser.add_argument("--triton-cache", type=Path, help="directory to keep; an empty one for a time otherwise")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="further flags of mamba-serve")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.imports:
        print(json.dumps({"benchmark": "imports", "seconds": measure_imports()}), flush=True)
    with contextlib.ExitStack() as stack:
        cache = options.triton_cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        warm = []
        for number in range(options.starts):
            is_empty = number == 0 and not any(cache.glob("*"))
            start = measure_start(options, cache)
            if not is_empty:
                warm.append(start.ready)
            line = {
                "benchmark": "start",
                "model": Path(options.model).name,
                "triton_cache": "empty" if is_empty else "warm",
            }
            print(json.dumps(line | start.describe()), flush=True)
    if warm:
        print(json.dumps({"benchmark": "start", "model": Path(options.model).name, "ready_s": statistics.median(warm)}))


if __name__ == "__main__":
    main()
