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
from tests.fakes import FakeEngine

TEXTS = ["", "hello", "naïve café", "\U0001f9a5 \U0001f680", "a\u0000b", "x" * 70_000]

USER = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]},
]


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
    "fields",
    [
        {"messages": USER},
        {"messages": TALK},
        {"messages": TALK, "add_generation_prompt": False},
        {"messages": TALK, "continue_final_message": True},
        {"messages": TALK, "continue_final_message": True, "add_generation_prompt": False},
        {"messages": USER, "add_special_tokens": True},
        {"messages": USER, "chat_template_kwargs": {"mood": "good"}},
    ],
)
async def test_a_conversation_is_what_a_chat_would_send(
    serve: Serve, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    async with serve(enable_chat_template_kwargs=True) as server:
        answer = (await tokenize(server, **fields)).json()
        await server.client.post("/v1/chat/completions", json={**fields, "max_tokens": 1})
        assert tuple(answer["tokens"]) == engine.requests[-1].prompt_token_ids
        assert answer["count"] == len(answer["tokens"])


@pytest.mark.anyio
async def test_the_text_of_a_conversation(serve: Serve) -> None:
    async with serve() as server:
        for fields, end in (({}, "<|im_start|>assistant\n"), ({"add_generation_prompt": False}, "")):
            answer = (await tokenize(server, messages=USER, **fields)).json()
            text = (await server.client.post("/detokenize", json={"tokens": answer["tokens"]})).json()["prompt"]
            assert text == "<|im_start|>user\nHi<|im_end|>\n" + end


@pytest.mark.anyio
async def test_a_model_without_a_template(serve: Serve) -> None:
    async with serve(template=None) as server:
        response = await tokenize(server, messages=USER)
        assert response.status_code == 400
        error = check_error(response.headers, response.content)
        assert error["param"] == "messages"
        assert "--chat-template" in error["message"]
        assert (await tokenize(server, prompt="Hi")).status_code == 200


@pytest.mark.anyio
async def test_a_template_is_never_rendered_on_the_loop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    async with serve() as server:
        service = server.context.tokens
        assert service is not None
        encode = service._encode

        def watched(body: Any) -> list[int]:
            threads.append(threading.current_thread())
            assert server.context.token_work.num_bytes >= 2**20
            return encode(body)

        monkeypatch.setattr(service, "_encode", watched)
        assert (await tokenize(server, messages=USER)).status_code == 200
        assert threads != [threading.main_thread()]
        assert server.context.token_work.num_bytes == 0


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
        ("/tokenize", {"messages": ["a"]}, "messages[0]"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": USER, "tools": "a"}, "tools"),
        ("/tokenize", {"messages": USER, "continue_final_message": 1}, "continue_final_message"),
        ("/tokenize", {"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"messages": USER, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        (
            "/tokenize",
            {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
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
