"""Servers of one model that take the same requests, started one at a time and asked by the same client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.start import free_port
from benchmarks.streams import Outcome, StreamClient, run, total
from benchmarks.words import text_of, tokens_of

_HOST = "127.0.0.1"
_START_SECONDS = 300
_STOP_SECONDS = 30
_ANSWER_SECONDS = 600
_LOG_LINES = 20
# the one that tells why an answer ended, and [DONE]
_EVENTS_WITHOUT_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """A server and how it is started: ``command`` of a port, ``ready_path`` answers 200 once it serves."""

    name: str
    weights: str
    command: Callable[[int], list[str]]
    ready_path: str


@dataclass(frozen=True, slots=True)
class Serving:
    """A contender that is up."""

    contender: Contender
    port: int

    def continue_greedily(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The tokens that follow a prompt."""
        body = request_body(prompt, num_tokens, is_streamed=False)
        request = urllib.request.Request(
            f"http://{_HOST}:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as response:
            return tokens_of(json.load(response)["choices"][0]["text"])

    def stream(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Outcome:
        """Ask for a streamed continuation of every prompt, all at once. Raises ConnectionError when one fails."""
        outcome = run(stream_all(self.port, prompts, num_tokens))
        if outcome.num_tokens != num_tokens * len(prompts):
            raise ConnectionError(
                f"{self.contender.name} sent {outcome.num_tokens} tokens, not {len(prompts)} x {num_tokens}"
            )
        return outcome


class EventClient(StreamClient):
    """A stream whose tokens are its events, which is so where every token has a text and is sent when it is made."""

    def _num_tokens(self) -> int:
        try:
            return super()._num_tokens()
        except ConnectionError:
            return len(self._arrivals) - _EVENTS_WITHOUT_TOKENS


def ours(model: str, tokenizer: Path, weights: Sequence[str], threads: int, num_rows: int) -> Contender:
    """This project's server. ``weights``: the flags that name their type."""

    def command(port: int) -> list[str]:
        flags = ["--model", model, "--tokenizer", str(tokenizer), "--device", "cpu", *weights]
        flags += ["--num-threads", str(threads), "--max-num-seqs", str(num_rows), "--port", str(port)]
        return [sys.executable, "-m", "app", *flags, "--disable-access-log", "--log-level", "warning"]

    return Contender("mamba-serve", " ".join(weights[1::2]), command, "/readyz")


def packaged(python: str, gguf: Path, weights: str, threads: int, context_length: int) -> Contender:
    """The server in llama-cpp-python's package. It works on one request at a time.

    Its defaults would compute the logits of every prompt token and break off a stream when the next request comes.
    """

    def command(port: int) -> list[str]:
        flags = ["--model", str(gguf), "--host", _HOST, "--port", str(port), "--n_ctx", str(context_length)]
        flags += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--logits_all", "false"]
        return [python, "-m", "llama_cpp.server", *flags, "--interrupt_requests", "false", "--verbose", "false"]

    return Contender("llama-cpp-python", weights, command, "/v1/models")


def batching(
    python: str, script: Path, gguf: Path, weights: str, threads: int, num_rows: int, context_length: int
) -> Contender:
    """The server in the examples of llama-cpp-python's sources, which decodes rows together."""

    def command(port: int) -> list[str]:
        model = {
            "path": str(gguf),
            "alias": "mamba",
            "n_ctx": num_rows * context_length,
            "n_seq_max": num_rows,
            "n_batch": context_length,
            "n_ubatch": 512,
            "threads": threads,
            "threads_batch": threads,
            "store_logits": False,
        }
        path = gguf.with_suffix(".json")
        path.write_text(json.dumps({"server": {"host": _HOST, "port": port}, "model": model}), encoding="utf-8")
        return [python, str(script), "--config-file", str(path)]

    return Contender("llama-cpp-python, batching example", weights, command, "/v1/models")


@contextlib.contextmanager
def serving(contender: Contender, log_path: Path) -> Iterator[Serving]:
    """Start a server, wait until it is ready, stop it in the end. Raises SystemExit with its log when it is not."""
    port = free_port()
    with log_path.open("wb") as log:
        process = subprocess.Popen(contender.command(port), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(contender, port, process, log_path)
        yield Serving(contender, port)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(contender: Contender, port: int, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{_HOST}:{port}{contender.ready_path}"):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log_path.read_text(errors="replace").splitlines()
            raise SystemExit("\n".join([f"{contender.name} does not serve:", *lines[-_LOG_LINES:]]))
        time.sleep(0.1)


def request_body(prompt: Sequence[int], num_tokens: int, *, is_streamed: bool) -> dict[str, Any]:
    """The same for every contender; the packaged server reads no token ids and tells no usage."""
    usage = {"stream_options": {"include_usage": True}} if is_streamed else {}
    return {
        "prompt": text_of(prompt),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        # what llama-cpp-python's server has otherwise is 1.1
        "repeat_penalty": 1.0,
        "ignore_eos": True,
        "stream": is_streamed,
        **usage,
    }


async def stream_all(port: int, prompts: Sequence[Sequence[int]], num_tokens: int) -> Outcome:
    """One connection and one stream for each prompt, all started together."""
    loop = asyncio.get_running_loop()
    requests = [request_bytes(port, request_body(prompt, num_tokens, is_streamed=True)) for prompt in prompts]
    clients = [(await loop.create_connection(EventClient, _HOST, port))[1] for _ in prompts]
    outcomes = [Outcome() for _ in prompts]
    try:
        await asyncio.gather(*map(EventClient.run, clients, requests, outcomes))
    finally:
        for client in clients:
            client.close()
    return total(outcomes)


def request_bytes(port: int, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {_HOST}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def random_prompts(num_prompts: int, length: int, vocab_size: int, seed: object) -> list[list[int]]:
    """Prompts that begin differently for every seed, so that no server has seen them."""
    dice = random.Random(str(seed))
    return [[dice.randrange(vocab_size) for _ in range(length)] for _ in range(num_prompts)]
