"""Memory is constant: peak of the server's processes for a short prompt, a very long one and a long generation.

Every case gets a server of its own, so that no peak hides behind another. Linux only: the peak is the kernel's own.

    python -m benchmarks.memory --model models/mamba-python-15m
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_SECONDS = 600
REQUEST_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    prompt_tokens: int
    output_tokens: int


CASES = (
    Case("short prompt", 100, 1),
    Case("long prompt", 100_000, 1),
    Case("long generation", 100, 20_000),
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="further flags of mamba-serve")
    return parser.parse_args(arguments)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """A server process that is ready; yields its URL and the process."""
    port = free_port()
    command = [sys.executable, "-m", "app", "--model", options.model, "--device", options.device, "--port", str(port)]
    command += ["--log-level", "warning", *options.server_args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server left with exit status {process.returncode}")
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_SECONDS} s")


def peak_mib(process: psutil.Process) -> float:
    """The largest resident size the process ever had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(kilobytes) / 1024, 1)


def run_case(case: Case, options: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    tokens = random.Random(case.prompt_tokens)
    body = {
        "prompt": [tokens.randrange(vocab_size) for _ in range(case.prompt_tokens)],
        "max_tokens": case.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    with server(options) as (url, api):
        engine = max(api.children(recursive=True), key=lambda child: child.memory_info().rss)
        before = {"api": peak_mib(api), "engine": peak_mib(engine)}
        start = time.perf_counter()
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=REQUEST_SECONDS)
        seconds = time.perf_counter() - start
        response.raise_for_status()
        after = {"api": peak_mib(api), "engine": peak_mib(engine)}
    usage = response.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (case.prompt_tokens, case.output_tokens)
    return {
        "case": case.name,
        "model": options.model,
        "prompt_tokens": case.prompt_tokens,
        "output_tokens": case.output_tokens,
        "seconds": round(seconds, 2),
        "ready_peak_rss_mib": before,
        "peak_rss_mib": after,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    for case in CASES:
        print(json.dumps(run_case(case, options, vocab_size)), flush=True)


if __name__ == "__main__":
    main()
