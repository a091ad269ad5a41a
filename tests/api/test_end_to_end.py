"""The real thing: ``python -m app`` over a tiny checkpoint, with its engine process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from mamba_core import MambaConfig, MambaForCausalLM
from tests.api.conftest import byte_tokenizer_json
from tests.api.processes import Process, free_port, lines_of, wait_for
from tests.api.raw import post

Start = Callable[..., Process]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand random parameters over single bytes."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=256, pad_token_id=256
    )
    MambaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(byte_tokenizer_json())
    return directory


@pytest.fixture(scope="module")
def start(checkpoint: Path) -> Iterator[Start]:
    processes = []

    def start(*flags: str, model: Path = checkpoint) -> Process:
        port = free_port()
        process = Process(["-m", "app", str(model), "--port", str(port), "--num-threads", "1", *flags], port)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


@pytest.fixture(scope="module")
def server(start: Start) -> Process:
    """One with two slots, for all tests that leave it as it was."""
    process = start("--max-num-seqs", "2")
    process.wait_ready()
    return process


def engine_of(process: Process) -> psutil.Process:
    children = psutil.Process(process.popen.pid).children()
    # beside it there may be the process that tries grammars out
    (engine,) = (child for child in children if "app.engine.process" in child.cmdline())
    return engine


def test_the_official_client(server: Process) -> None:
    assert "slots: 2 x" in server.ready_text
    asyncio.run(use_official_client(server.url))
    page = httpx.get(server.url + "/metrics").text
    assert 'vllm:kv_cache_usage_perc{model_name="tiny"} 0.0' in page


async def use_official_client(url: str) -> None:
    prompts = [f"{'x' * number}def f_{number}" for number in range(16)]
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        alone = [(await client.completions.create(prompt=prompt, **fields)).choices[0].text for prompt in prompts]

        async def stream(prompt: str) -> str:
            chunks = await client.completions.create(prompt=prompt, stream=True, **fields)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        assert await asyncio.gather(*map(stream, prompts)) == alone
    assert len(set(alone)) > 1


def test_the_engine_obeys_every_rule_of_a_request(server: Process) -> None:
    def complete(**fields: Any) -> dict[str, Any]:
        response = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "hello", "max_tokens": 12, **fields}, timeout=60
        )
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    allowed = complete(allowed_token_ids=[97, 98], return_token_ids=True)
    assert set(allowed["token_ids"]) <= {97, 98}
    assert complete(allowed_token_ids=[66, 67], bad_words=["c"])["text"] == "d" * 12
    ends = {"allowed_token_ids": [67, 256], "logit_bias": {"256": 100}}
    assert (complete(**ends)["text"], complete(**ends, min_tokens=5)["text"]) == ("", "d" * 5)
    assert complete(structured_outputs={"choice": ["yes", "no"]})["text"] in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert json.loads(complete(response_format=form, max_tokens=100)["text"])["a"] in (1, 2)
    scored = complete(echo=True, logprobs=1, prompt_logprobs=1, max_tokens=1, temperature=0)
    told = [next(iter(each.values()))["logprob"] for each in scored["prompt_logprobs"][1:]]
    assert scored["logprobs"]["token_logprobs"][:5] == [None, *told]
    # a prompt that is cut is the same as a shorter one
    cut = complete(prompt="what? hello", truncate_prompt_tokens=5, temperature=0, logprobs=0)
    assert cut == complete(temperature=0, logprobs=0)


@pytest.mark.parametrize("way", [{"temperature": 0}, {"seed": 7}, {"seed": 8, "n": 2, "frequency_penalty": 1.0}])
def test_forced_tokens_are_those_that_would_have_been_drawn(server: Process, way: dict[str, Any]) -> None:
    names = ("customer_has_confirmed_the_address", "payment_is_expected_within_thirty_days")
    schema = {
        "type": "object",
        "properties": {name: {"enum": ["yes", "no"]} for name in names},
        "required": list(names),
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema | {"additionalProperties": False}}}
    body = {"prompt": "hello", "max_tokens": 400, "response_format": form, **way}

    def num_steps() -> float:
        page = httpx.get(server.url + "/metrics").text
        return float(re.findall(r"^mamba_engine_steps_total (\S+)$", page, re.MULTILINE)[0])

    def complete(**fields: Any) -> tuple[dict[str, Any], float]:
        before = num_steps()
        response = httpx.post(f"{server.url}/v1/completions", json=body | fields, timeout=60)
        assert response.status_code == 200, response.text
        return response.json(), num_steps() - before

    at_once, few = complete(return_token_ids=True)
    # log-probabilities are told of tokens that are drawn
    drawn, many = complete(logprobs=0, return_token_ids=True)
    assert few < many - 0.8 * sum(map(len, names))
    assert at_once["usage"] == drawn["usage"]
    for choice, expected in zip(at_once["choices"], drawn["choices"], strict=True):
        assert set(json.loads(choice["text"])) == set(names)
        assert choice == {**expected, "logprobs": None}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        texts = [""] * len(at_once["choices"])
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in at_once["choices"]]
    form["json_schema"]["schema"]["x-guidance"] = {"whitespace_pattern": ""}
    compact, fewer = complete()
    assert not set(compact["choices"][0]["text"]) & set(" \n")
    assert fewer < 20
    # a text that ends the output in the middle of what is certain
    cut = complete(stop=["confirmed_"])[0]["choices"][0]
    assert cut["text"] == compact["choices"][0]["text"].partition("confirmed_")[0]
    assert cut["finish_reason"] == "stop"


def test_the_best_sample_is_the_likeliest_per_token(server: Process) -> None:
    body = {"prompt": "hello", "max_tokens": 6, "logprobs": 0, "seed": 3, "ignore_eos": True}
    all_of_them, best = (
        httpx.post(f"{server.url}/v1/completions", json={**body, **fields}, timeout=60).json()
        for fields in ({"n": 2}, {"best_of": 2})
    )
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in all_of_them["choices"]]
    expected = all_of_them["choices"][means.index(max(means))]
    assert best["choices"] == [{**expected, "index": 0}]
    assert best["usage"] == all_of_them["usage"]


def test_disconnects_free_the_slots(server: Process) -> None:
    port = int(server.url.rpartition(":")[2])
    for stream in (False, True):
        # two run and two wait
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for client in clients:
            client.sendall(post({"prompt": "hello", "max_tokens": 10**6, "ignore_eos": True, "stream": stream}))
        wait_for(lambda: counts(server)[1:] == (2, 2))
        for client in clients:
            client.close()
        wait_for(lambda: counts(server) == (0, 0, 0), 2)


def counts(server: Process) -> tuple[int, int, int]:
    load = httpx.get(server.url + "/load").json()
    return load["num_open_requests"], load["num_slots_used"], load["num_waiting"]


def test_streams_go_on_when_the_engine_was_killed(server: Process) -> None:
    process = server
    body = {"prompt": "hello", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
    expected = httpx.post(process.url + "/v1/completions", json=body, timeout=20).json()
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", process.url + "/v1/completions", json={**body, "stream": True}, timeout=30) as response:
        for line in filter(None, response.iter_lines()):
            if len(events) == 20:
                engine_of(process).kill()
                wait_for(lambda: httpx.get(process.url + "/readyz").status_code == 503)
                assert httpx.get(process.url + "/livez").status_code == 200
            if line != "data: [DONE]":
                events.append(json.loads(line.removeprefix("data: ")))
    assert line == "data: [DONE]"
    assert "".join(event["choices"][0]["text"] for event in events) == expected["choices"][0]["text"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert httpx.get(process.url + "/readyz").status_code == 200
    page = httpx.get(process.url + "/metrics").text
    assert "mamba_engine_restarts_total 1.0" in page
    assert "mamba_requests_resumed_total 1.0" in page


def test_streams_finish_on_sigterm(start: Start) -> None:
    process = start()
    process.wait_ready()
    engine = engine_of(process)
    streams = [process.open_stream(500) for _ in range(4)]
    process.signal()
    for stream in streams:
        assert '"finish_reason":"' in stream.finish()[-2]
    code, errors = process.wait(5)
    assert code == 0
    assert "Traceback" not in errors
    assert not engine.is_running()


def test_no_child_outlives_a_killed_server(start: Start) -> None:
    process = start()
    process.wait_ready()
    body = {"prompt": "hello", "max_tokens": 1, "response_format": {"type": "json_object"}}
    assert httpx.post(process.url + "/v1/completions", json=body).status_code == 200
    children = psutil.Process(process.popen.pid).children()
    assert len(children) == 2
    os.kill(process.popen.pid, signal.SIGKILL)
    assert psutil.wait_procs(children, 5)[1] == []


def test_a_broken_checkpoint_never_opens_the_port(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    processes = [start(model=broken(checkpoint, tmp_path / fault, fault)) for fault in ("missing", "cut", "llama")]
    codes = set()
    while any(process.popen.poll() is None for process in processes):
        codes |= {process.status("/livez") for process in processes}
        time.sleep(0.05)
    assert codes <= {0}
    for process in processes:
        code, errors = process.wait(5)
        assert code == 1
        assert len(lines_of(errors, "CRITICAL")) == 1
        assert "Traceback" not in errors


def broken(checkpoint: Path, directory: Path, fault: str) -> Path:
    """A copy of a checkpoint without weights, with half of them, or of another kind."""
    shutil.copytree(checkpoint, directory)
    weights = directory / "model.safetensors"
    if fault == "missing":
        weights.unlink()
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory
