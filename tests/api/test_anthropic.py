"""Anthropic's form of conversations over a real socket."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from app.serving.tokenizer import Tokenizer
from tests.api.conftest import KEY, MODEL, Running, Serve
from tests.api.test_chat import prompt_of, say

pytestmark = pytest.mark.anyio


async def ask(server: Running, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 50, **fields}
    return await server.client.post("/v1/messages", json=body)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for frame in response.text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.mark.parametrize(
    ("script", "fields", "text", "reason", "sequence"),
    [
        ("Grüße!", {}, "Grüße!", "end_turn", None),
        ("", {}, "", "end_turn", None),
        ("x" * 100, {"max_tokens": 3}, "xxx", "max_tokens", None),
        ("one two", {"stop_sequences": [" t"]}, "one", "stop_sequence", " t"),
    ],
)
@pytest.mark.parametrize("burst", [1, 50])
async def test_answers(
    serve: Serve,
    tokenizer: Tokenizer,
    script: str,
    fields: dict[str, Any],
    text: str,
    reason: str,
    sequence: str | None,
    burst: int,
) -> None:
    async with serve() as server:
        server.engine.script, server.engine.burst = say(tokenizer, script), burst
        whole = (await ask(server, system="be short", **fields)).json()
        assert prompt_of(server, tokenizer).startswith("<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n")
        num_tokens = len(server.engine.requests[0].prompt_token_ids)
        assert whole.pop("id").startswith("msg_")
        usage = whole.pop("usage")
        assert usage["input_tokens"] == num_tokens
        assert whole == {
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": [{"type": "text", "text": text}],
            "stop_reason": reason,
            "stop_sequence": sequence,
        }
        start, block, *deltas, block_end, end, stop = events_of(
            await ask(server, system="be short", stream=True, **fields)
        )
        assert start["type"] == "message_start"
        assert start["message"]["content"] == []
        assert start["message"]["usage"] == {"input_tokens": num_tokens, "output_tokens": 0}
        assert block == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        assert {delta["type"] for delta in deltas} <= {"content_block_delta"}
        assert "".join(delta["delta"]["text"] for delta in deltas) == text
        assert block_end == {"type": "content_block_stop", "index": 0}
        assert end["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
        assert end["usage"] == {"output_tokens": usage["output_tokens"]}
        assert stop == {"type": "message_stop"}
        await server.is_idle()


async def test_what_the_assistant_began_is_continued(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        parts = [{"type": "text", "text": "The answer"}, {"type": "text", "text": "is"}]
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": parts}]
        assert (await ask(server, messages=messages)).status_code == 200
        assert prompt_of(server, tokenizer).endswith("<|im_start|>assistant\nThe answer\nis")


async def test_a_failure_is_the_last_event(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "x" * 100)
        server.engine.fail_at = 3
        *events, last = events_of(await ask(server, stream=True))
        assert [event["type"] for event in events].count("content_block_delta") == 3
        assert (last["type"], last["error"]["type"]) == ("error", "server_error")
        await server.is_idle()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": 1.5}, "temperature"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"context_management": {"edits": []}}, "context_management"),
    ],
)
async def test_what_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    async with serve(max_model_len=500) as server:
        response = await ask(server, **fields)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
        assert server.engine.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "be short"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Oh,"}]},
        {"thinking": {"type": "disabled"}, "tools": []},
    ],
)
async def test_tokens_are_counted_without_the_engine(serve: Serve, fields: dict[str, Any]) -> None:
    async with serve() as server:
        body = {"messages": [{"role": "user", "content": "hello"}], **fields}
        counted = await server.client.post("/v1/messages/count_tokens", json=body)
        assert server.engine.requests == []
        usage = (await ask(server, **fields)).json()["usage"]
        assert (counted.status_code, counted.json()) == (200, {"input_tokens": usage["input_tokens"]})
        assert usage["input_tokens"] == len(server.engine.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"system": 5}, "system"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"model": 5}, "model"),
    ],
)
async def test_what_is_not_counted(serve: Serve, fields: dict[str, Any], param: str) -> None:
    async with serve() as server:
        body = {"messages": [{"role": "user", "content": "hello"}], **fields}
        response = await server.client.post("/v1/messages/count_tokens", json=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param


async def test_a_key_in_anthropics_header(serve: Serve) -> None:
    async with serve(api_key=[KEY]) as server:
        for headers, status in (
            ({"x-api-key": KEY}, 200),
            ({"x-api-key": "sk-wrong"}, 401),
            ({}, 401),
            ({"x-api-key": KEY, "authorization": "Bearer sk-wrong"}, 401),
        ):
            server.client.headers = httpx.Headers(headers)
            assert (await ask(server, max_tokens=1)).status_code == status
            body = {"messages": [{"role": "user", "content": "hello"}]}
            assert (await server.client.post("/v1/messages/count_tokens", json=body)).status_code == status
        server.client.headers = httpx.Headers({"x-api-key": KEY})
        assert (await server.complete()).status_code == 401
