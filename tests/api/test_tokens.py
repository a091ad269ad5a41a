"""Text to token ids and back: vLLM's shapes, strict bodies, bounded work that is off the loop when it is large."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from app.api.admission import ByteBudget
from app.serving.errors import Overloaded
from tests.api.conftest import KEY, MODEL, Running, Serve
from tests.api.raw import exchange, post
from tests.api.test_errors import check_error

TEXTS = ["", "hello", "naïve café", "\U0001f9a5 \U0001f680", "a\u0000b", "x" * 70_000]


async def tokenize(server: Running, **fields: Any) -> Any:
    return await server.client.post("/tokenize", json=fields)


@pytest.mark.anyio
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
async def test_there_and_back(serve: Serve, text: str) -> None:
    async with serve() as server:
        answer = (await tokenize(server, prompt=text)).json()
        # a token per byte in this tokenizer
        assert answer["count"] == len(answer["tokens"]) == len(text.encode())
        assert (answer["max_model_len"], answer["token_strs"]) == (None, None)
        back = await server.client.post("/detokenize", json={"tokens": answer["tokens"]})
        assert back.json() == {"prompt": text}


@pytest.mark.anyio
async def test_token_texts(serve: Serve) -> None:
    async with serve(max_model_len=77) as server:
        answer = (await tokenize(server, prompt="aé", return_token_strs=True, model=MODEL)).json()
        assert answer["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
        assert answer["max_model_len"] == 77
        assert list(answer) == ["count", "max_model_len", "tokens", "token_strs"]
        long = (await tokenize(server, prompt="ab" * 20_000, return_token_strs=True)).json()
        assert long["token_strs"] == ["a", "b"] * 20_000


@pytest.mark.anyio
async def test_special_tokens(serve: Serve) -> None:
    async with serve() as server:
        response = await server.client.post("/detokenize", json={"tokens": [256]})
        assert response.json() == {"prompt": "<|endoftext|>"}
        # what a client writes is text
        assert (await tokenize(server, prompt="<|endoftext|>")).json()["count"] == 13
        for choice in (True, False, None):
            assert (await tokenize(server, prompt="hi", add_special_tokens=choice)).json()["count"] == 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": "a"}, "messages"),
        ("/tokenize", {"messages": ["a"]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens"),
        ("/detokenize", {"tokens": [1, 1.0]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [0, 257]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
    ],
)
async def test_wrong_bodies(serve: Serve, path: str, body: dict[str, Any], param: str) -> None:
    async with serve() as server:
        response = await server.client.post(path, json=body)
        assert response.status_code == 400
        assert check_error(response.headers, response.content)["param"] == param


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
async def test_what_every_route_refuses(serve: Serve, path: str, body: dict[str, Any]) -> None:
    async with serve(max_body_size=1000, api_key=[KEY], served_model_name=["one", "two"]) as server:
        key = f"Authorization: Bearer {KEY}"
        assert (await exchange(server.port, post(body, path=path)))[0] == 401
        assert (await exchange(server.port, post(body, key, path=path)))[0] == 200
        assert (await exchange(server.port, post({**body, "model": "two"}, key, path=path)))[0] == 200
        assert (await exchange(server.port, post({**body, "model": "three"}, key, path=path)))[0] == 404
        assert (await exchange(server.port, post(b"{", key, path=path)))[0] == 400
        status, headers, content = await exchange(server.port, post(b" " * 1001, key, path=path))
        assert status == 413
        check_error(headers, content)
    async with serve(is_loading=True) as server:
        assert (await exchange(server.port, post(body, path=path)))[0] == 503


@pytest.mark.anyio
async def test_large_work_is_off_the_loop_and_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    is_working, may_go_on, threads = threading.Event(), threading.Event(), []
    async with serve(max_body_size=100_000) as server:
        service = server.context.tokens
        assert service is not None
        encode = service._encode

        def slow(body: Any) -> list[int]:
            threads.append(threading.current_thread())
            is_working.set()
            assert may_go_on.wait(10)
            return encode(body)

        monkeypatch.setattr(service, "_encode", slow)
        first = asyncio.create_task(tokenize(server, prompt="x" * 60_000))
        await asyncio.to_thread(is_working.wait, 5)
        # the loop turns, and what would be too much together is refused
        assert (await server.client.get("/livez")).status_code == 200
        response = await tokenize(server, prompt="x" * 60_000)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        check_error(response.headers, response.content, "rate_limit_error")
        may_go_on.set()
        assert (await first).json()["count"] == 60_000
        assert server.context.token_work.num_bytes == 0
        assert (await tokenize(server, prompt="x" * 60_000)).status_code == 200
        assert (await tokenize(server, prompt="x" * 100)).status_code == 200
        assert [thread is threading.main_thread() for thread in threads] == [False, False, True]


@pytest.mark.anyio
async def test_a_full_budget_reads_no_body(serve: Serve) -> None:
    async with serve(max_body_size=100) as server:
        with server.context.token_work.hold(500):
            head, separator, _ = post({"prompt": "x"}, path="/tokenize").partition(b"\r\n\r\n")
            assert (await exchange(server.port, head + separator))[0] == 429


def test_a_budget_keeps_its_books() -> None:
    budget = ByteBudget(10)
    with budget.hold(6):
        with pytest.raises(Overloaded), budget.hold(5):
            raise AssertionError
        with budget.hold(4), pytest.raises(Overloaded):
            budget.check()
        budget.check()
    with budget.hold(50):
        assert budget.num_bytes == 50
    assert budget.num_bytes == 0


@pytest.mark.anyio
async def test_a_large_list_is_plain_json(serve: Serve) -> None:
    async with serve() as server:
        started = time.monotonic()
        response = await tokenize(server, prompt="y" * 500_000)
        assert json.loads(response.content)["tokens"] == [response.json()["tokens"][0]] * 500_000
        assert time.monotonic() - started < 10
