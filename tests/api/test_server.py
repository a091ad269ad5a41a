"""The server as a process: start, ready line, drain, second signal, lost engine, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import byte_tokenizer_json
from tests.api.processes import Process, free_port, lines_of, wait_for


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-fox"
    directory.mkdir()
    (directory / "tokenizer.json").write_text(byte_tokenizer_json())
    return directory


@pytest.fixture
def start(model_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    processes = []

    def start(plan: dict[str, Any] | None = None, **settings: Any) -> Process:
        chosen = {"model": str(model_dir), "port": free_port(), **settings}
        told = {**(plan or {}), "settings": chosen, "stopped": str(tmp_path / "stopped")}
        process = Process(["-m", "tests.api.fake_server", json.dumps(told)], chosen["port"])
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def test_the_ready_line_can_be_pasted(start: Callable[..., Process], tmp_path: Path) -> None:
    process = start()
    process.wait_ready()
    assert "slots: 8 x" in process.ready_text
    assert f"ready: {process.url}" in process.ready_text
    assert f"docs:  {process.url}/docs" in process.ready_text
    command = re.search(r"curl .*", process.ready_text)
    assert command is not None
    done = subprocess.run(["sh", "-c", command[0] + " -s"], capture_output=True, text=True, timeout=20)
    assert done.stdout.endswith("data: [DONE]\n\n")
    assert '"model":"tiny-fox"' in done.stdout
    process.signal()
    code, errors = process.wait(5)
    assert code == 0
    assert "Traceback" not in errors
    assert (tmp_path / "stopped").read_text().startswith("stopped with 0 live")


def test_keys_are_read_again_on_a_hangup(start: Callable[..., Process], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice = sk-first")
    process = start(api_key_file=str(keys))
    process.wait_ready()

    def status(key: str) -> int:
        return httpx.get(process.url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert (status("sk-first"), status("sk-second")) == (200, 401)
    assert "docs:" not in process.ready_text
    keys.write_text("alice = sk-second")
    process.signal(signal.SIGHUP)
    wait_for(lambda: status("sk-second") == 200)
    assert status("sk-first") == 401
    for broken in ("", "alice = sk-third oops"):
        keys.write_text(broken)
        process.signal(signal.SIGHUP)
        assert (status("sk-second"), status("sk-third")) == (200, 401)
    process.signal()
    code, errors = process.wait(5)
    assert code == 0
    assert len(lines_of(errors, "ERROR")) >= 1
    assert "the keys stay as they were" in errors
    assert "sk-" not in errors
    assert " key=alice" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_streams_finish_while_new_requests_are_refused(start: Callable[..., Process], number: int) -> None:
    process = start({"delay": 0.02})
    process.wait_ready()
    streams = [process.open_stream(60) for _ in range(4)]
    process.signal(number)
    wait_for(lambda: process.status("/readyz") == 503)
    assert process.status("/livez") == 200
    response = httpx.post(process.url + "/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.headers["connection"] == "close"
    for stream in streams:
        events = stream.finish()
        assert len(events) == 61
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert process.wait(10)[0] == 0


def test_the_port_stays_open_for_the_drain_delay(start: Callable[..., Process]) -> None:
    process = start(drain_delay=1.5)
    process.wait_ready()
    started = time.monotonic()
    process.signal()
    while time.monotonic() - started < 1.2:
        assert process.status("/readyz") == 503
        time.sleep(0.1)
    assert process.wait(10)[0] == 0
    assert time.monotonic() - started > 1.4


def test_the_drain_has_an_end(start: Callable[..., Process], tmp_path: Path) -> None:
    process = start({"delay": 0.02}, shutdown_timeout=0.5)
    process.wait_ready()
    streams = [process.open_stream(10**6) for _ in range(4)]
    started = time.monotonic()
    process.signal()
    for stream in streams:
        events = stream.finish()
        assert json.loads(events[-2])["error"]["type"] == "service_unavailable_error"
    assert process.wait(10)[0] == 0
    assert time.monotonic() - started < 10
    assert (tmp_path / "stopped").read_text().startswith("stopped with 0 live")


def test_a_second_signal_ends_it_now(start: Callable[..., Process], tmp_path: Path) -> None:
    process = start({"delay": 0.02}, drain_delay=60)
    process.wait_ready()
    stream = process.open_stream(10**6)
    process.signal(signal.SIGINT)
    wait_for(lambda: process.status("/readyz") == 503)
    process.signal(signal.SIGINT)
    code, _ = process.wait(2)
    assert code == 1
    assert "error" in json.loads(stream.finish()[-2])
    assert (tmp_path / "stopped").exists()


def test_a_lost_engine_ends_streams_and_process(start: Callable[..., Process]) -> None:
    process = start({"delay": 0.02})
    process.wait_ready()
    stream = process.open_stream(10**6)
    process.signal(signal.SIGUSR1)
    code, errors = process.wait(5)
    assert code == 1
    assert "crashed too often" in errors
    assert "Traceback" not in errors
    assert "error" in json.loads(stream.finish()[-2])


def test_while_the_model_loads(start: Callable[..., Process], tmp_path: Path) -> None:
    process = start({"start_seconds": 0.5, "load_seconds": 30})
    assert process.status("/livez") == 0
    wait_for(lambda: process.status("/livez") == 200)
    assert process.status("/readyz") == 503
    assert process.status("/metrics") == 200
    response = httpx.post(process.url + "/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert response.headers["retry-after"]
    started = time.monotonic()
    process.signal()
    assert process.wait(10)[0] == 0
    assert time.monotonic() - started < 10
    assert (tmp_path / "stopped").exists()


def test_a_signal_before_the_port_opens(start: Callable[..., Process], tmp_path: Path) -> None:
    process = start({"start_seconds": 60})
    assert process.popen.stderr is not None
    assert "starting" in process.popen.stderr.readline()
    process.signal()
    assert process.wait(10)[0] == 0
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("when", ["start_error", "load_error"])
def test_a_checkpoint_that_is_broken(start: Callable[..., Process], when: str) -> None:
    process = start({when: "model.safetensors is truncated"})
    code, errors = process.wait(10)
    assert code == 1
    assert len(lines_of(errors, "CRITICAL")) == 1
    assert "Traceback" not in errors
    assert "model.safetensors is truncated" in errors


def test_a_tokenizer_that_is_broken(start: Callable[..., Process], model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text("{}")
    process = start()
    code, errors = process.wait(10)
    assert code == 1
    assert len(lines_of(errors, "CRITICAL")) == 1
    assert "Traceback" not in errors
    assert "tokenizer" in errors


def test_a_port_that_is_taken(start: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(port=port)
        code, errors = process.wait(10)
    assert code == 1
    assert len(lines_of(errors, "CRITICAL")) == 1
    assert "Traceback" not in errors
    assert str(port) in errors


def test_json_lines(start: Callable[..., Process]) -> None:
    process = start(log_format="json")
    process.wait_ready()
    httpx.get(process.url + "/v1/models", headers={"x-request-id": "mine"})
    httpx.get(process.url + "/readyz")
    process.signal()
    code, errors = process.wait(5)
    assert code == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    (access,) = [line for line in lines if line["logger"] == "app.access"]
    assert access["request_id"] == "mine"
    assert access["message"] == "GET /v1/models 200"


def test_the_tests_leave_no_variables() -> None:
    assert not [name for name in os.environ if name.startswith("MAMBA_")]
