"""Everything at once for a while: nothing may fail, and nothing may stay behind.

Some seconds here; ``SOAK_SECONDS=1800 python -m pytest tests/api/test_soak.py`` for a night.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.api.processes import Process, free_port, wait_for

NUM_CLIENTS = 8
MODEL = Path(__file__).parents[2] / "models" / "mamba-python-15m"
# of which some three are warm-up
DEFAULT_SECONDS = 9.0
# what an allocator keeps, for a run of any length
MAX_GROWTH_BYTES = 48 * 2**20
MAX_MORE_THREADS = 8
PATH = "/v1/completions"
BODY = {"prompt": "import os\n", "max_tokens": 12}


@pytest.fixture
def server() -> Iterator[Process]:
    port = free_port()
    limits = ["--num-threads", "1", "--max-num-seqs", "4", "--max-queue", "8"]
    # nobody reads what is logged while this goes on
    flags = ["--port", str(port), "--chat-template", "chatml", "--disable-access-log", *limits]
    process = Process(["-m", "app", str(MODEL), *flags], port)
    yield process
    process.kill()


class Client(threading.Thread):
    """Does one thing after the other, chosen by chance, until it is told to stop; counts what was answered."""

    def __init__(self, url: str, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.error: BaseException | None = None
        self._stop_event = stop
        self._http = httpx.Client(base_url=url, timeout=30)
        self._source = random.Random(seed)
        self._ways: dict[str, Callable[[], int]] = {
            "whole": lambda: self._post(PATH, BODY),
            "several": lambda: self._post(PATH, {**BODY, "n": 2, "logprobs": 2, "user": str(self._source.random())}),
            "long prompt": lambda: self._post(PATH, {"prompt": [5] * self._source.randrange(1, 3000), "max_tokens": 1}),
            "held to a form": lambda: self._post(PATH, BODY | {"structured_outputs": {"regex": self._pattern()}}),
            "stream": lambda: self._stream(None),
            "stream that is left": lambda: self._stream(self._source.randrange(1, 5)),
            "chat": lambda: self._post(
                "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | SHORT
            ),
            "response": lambda: self._post("/v1/responses", {"input": "a", "max_output_tokens": 16}),
            "tokens": lambda: self._post("/tokenize", {"prompt": "a b" * self._source.randrange(1, 5000)}),
            "metrics": lambda: self._http.get("/metrics").status_code,
            "deadline": lambda: self._post(PATH, LONG, {"X-Request-Timeout": "0.05"}),
            "wrong value": lambda: self._post(PATH, {**BODY, "temperature": 5}),
            "wrong grammar": lambda: self._post(PATH, {**BODY, "structured_outputs": {"regex": "("}}),
            "no JSON": lambda: self._http.post(PATH, content=b"{", headers=JSON).status_code,
            "no route": lambda: self._http.get(f"/{self._source.random()}").status_code,
        }

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                way = self._source.choice(list(self._ways))
                self.answers[way, self._ways[way]()] += 1
        except BaseException as error:
            self.error = error
        finally:
            self._http.close()

    def _pattern(self) -> str:
        return f"a{{1,{self._source.randrange(2, 200)}}}"

    def _post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> int:
        return self._http.post(path, json=body, headers=headers).status_code

    def _stream(self, num_events: int | None) -> int:
        with self._http.stream("POST", PATH, json={**(BODY if num_events is None else LONG), "stream": True}) as answer:
            lines = [line for _, line in zip(range(num_events or 10**6), answer.iter_lines(), strict=False)]
            if answer.status_code == 200 and num_events is None:
                assert lines[-2] == "data: [DONE]"
                assert "error" not in json.loads(lines[-4].removeprefix("data: "))
            return answer.status_code


SHORT = {"max_tokens": 8}
LONG = {"prompt": "a", "max_tokens": 10**6, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}
# beside 429, which a full server may answer to every request for tokens
EXPECTED = {"deadline": 408, "wrong value": 400, "wrong grammar": 400, "no JSON": 400, "no route": 404}


def num_files(processes: list[psutil.Process]) -> int:
    return sum(process.num_fds() for process in processes)


def num_threads(processes: list[psutil.Process]) -> int:
    return sum(process.num_threads() for process in processes)


@pytest.mark.slow
def test_mixed_load_leaves_nothing_behind(server: Process) -> None:
    server.wait_ready()
    api = psutil.Process(server.popen.pid)
    stop = threading.Event()

    def work(seconds: float, seed: int) -> Counter[tuple[str, int]]:
        clients = [Client(server.url, seed + number, stop) for number in range(NUM_CLIENTS)]
        stop.clear()
        for client in clients:
            client.start()
        time.sleep(seconds)
        stop.set()
        for client in clients:
            client.join(60)
            if client.error is not None:
                raise client.error
        wait_for(lambda: is_idle(server.url))
        return sum((client.answers for client in clients), Counter())

    seconds = float(os.environ.get("SOAK_SECONDS", DEFAULT_SECONDS))
    work(seconds / 3, 0)
    everybody = [api, *api.children()]
    files, threads = num_files(everybody), num_threads(everybody)
    memory = [process.memory_info().rss for process in everybody]
    answers = work(seconds * 2 / 3, NUM_CLIENTS)
    assert [process.pid for process in api.children()] == [process.pid for process in everybody[1:]]
    unexpected = {key: count for key, count in answers.items() if key[1] not in (EXPECTED.get(key[0], 200), 429)}
    assert not unexpected
    assert {way for way, status in answers if status != 429} == set(Client(server.url, 0, stop)._ways)
    wait_for(lambda: num_files(everybody) <= files)
    # a pool may have had one more at work than before
    assert num_threads(everybody) <= threads + MAX_MORE_THREADS
    for process, bytes_before in zip(everybody, memory, strict=True):
        grown = process.memory_info().rss - bytes_before
        assert grown < MAX_GROWTH_BYTES, process
    page = httpx.get(server.url + "/metrics").text
    assert "mamba_engine_restarts_total 0.0" in page
    assert "mamba_http_requests_total" in page
    assert "0." not in {line.split('route="/')[1][:2] for line in page.splitlines() if 'route="/' in line}


def is_idle(url: str) -> bool:
    load = httpx.get(url + "/load").json()
    return not any(load[name] for name in ("num_open_requests", "num_running", "num_waiting", "num_slots_used"))
