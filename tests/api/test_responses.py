"""Responses over a real socket: whole, streamed, kept, gone on after, and through the official client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel

from app.schemas.messages import MAX_MESSAGES
from app.serving.tokenizer import Tokenizer
from tests.api.conftest import KEY, MODEL, Running, Serve
from tests.api.test_chat import CALL, WITH_TOOLS, client_of, prompt_of, say

pytestmark = pytest.mark.anyio

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def respond(server: Running, **fields: Any) -> httpx.Response:
    return await server.client.post("/v1/responses", json={"input": "hello", **fields})


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of all events, whose frames and numbers are checked."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    events = []
    for number, frame in enumerate(response.text.split("\n\n")[:-1]):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def without_ids(value: Any) -> Any:
    """Without what is drawn for each response."""
    if isinstance(value, dict):
        drawn = ("id", "item_id", "call_id", "created_at")
        return {key: without_ids(item) for key, item in value.items() if key not in drawn}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


async def test_a_whole_answer(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "Grüße!")
        response = await respond(server, instructions="be short", metadata={"a": "b"}, temperature=0.5, user="me")
        assert response.status_code == 200
        body = response.json()
        assert prompt_of(server, tokenizer) == (
            "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        )
        assert body["id"].startswith("resp_")
        assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
        assert without_ids(body["output"]) == [
            {
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Grüße!", "annotations": [], "logprobs": []}],
            }
        ]
        num_tokens = len(server.engine.requests[0].prompt_token_ids)
        num_written = len("Grüße!".encode()) + 1
        assert body["usage"] == {
            "input_tokens": num_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": num_written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_tokens + num_written,
        }
        said = {"instructions": "be short", "metadata": {"a": "b"}, "temperature": 0.5, "user": "me", "store": True}
        assert said.items() <= body.items()
        await server.is_idle()


async def test_a_stream_has_openais_events_in_order(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "Grüße!")
        events = events_of(await respond(server, stream=True))
        kinds = [event["type"].removeprefix("response.") for event in events]
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert len(deltas) > 1
        assert kinds == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            *["output_text.delta"] * len(deltas),
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        assert "".join(event["delta"] for event in deltas) == "Grüße!"
        assert events[0]["response"]["status"] == "in_progress"
        assert events[0]["response"]["usage"] is None
        final = events[-1]["response"]
        assert final["output"] == [events[-2]["item"]]
        items = {event["item_id"] for event in events if "item_id" in event}
        assert items == {final["output"][0]["id"]}
        assert without_ids(final) == without_ids((await respond(server)).json())
        assert (await server.client.get(f"/v1/responses/{final['id']}")).json() == final
        await server.is_idle()


@pytest.mark.parametrize("fields", [{}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}])
@pytest.mark.parametrize("script", ["", "some text"])
async def test_a_stream_says_what_a_whole_answer_says(
    serve: Serve, tokenizer: Tokenizer, fields: dict[str, Any], script: str
) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, script)
        for burst in (1, 3, 50):
            server.engine.burst = burst
            whole = (await respond(server, **fields)).json()
            events = events_of(await respond(server, stream=True, **fields))
            assert without_ids(events[-1]["response"]) == without_ids(whole)
            text = whole["output"][0]["content"][0]
            assert text["text"] == script
            told = [event for event in events if event["type"] == "response.output_text.delta"]
            assert [entry for event in told for entry in event["logprobs"]] == text["logprobs"]
            assert bool(text["logprobs"]) == bool(fields)


async def test_a_limit_makes_it_incomplete(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "x" * 100)
        whole = (await respond(server, max_output_tokens=3)).json()
        assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert whole["output"][0]["status"] == "incomplete"
        assert whole["output"][0]["content"][0]["text"] == "xxx"
        last = events_of(await respond(server, max_output_tokens=3, stream=True))[-1]
        assert last["type"] == "response.incomplete"
        assert without_ids(last["response"]) == without_ids(whole)


@pytest.mark.parametrize("fail_at", [0, 3])
async def test_a_failure_in_a_stream(serve: Serve, tokenizer: Tokenizer, fail_at: int) -> None:
    async with serve(ping_interval=0.02) as server:
        server.engine.script = say(tokenizer, "x" * 100)
        server.engine.fail_at, server.engine.delay = fail_at, 0.1
        response = await respond(server, stream=True)
        assert response.status_code == 200
        text = response.text.replace(": ping\n\n", "")
        events = events_of(httpx.Response(200, headers=response.headers, text=text))
        assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
        failed = events[-1]
        assert failed["type"] == "response.failed"
        assert (failed["response"]["status"], failed["response"]["store"]) == ("failed", False)
        assert failed["response"]["error"]["code"] == "server_error"
        texts = [part["text"] for item in failed["response"]["output"] for part in item["content"]]
        assert texts == (["x" * fail_at] if fail_at else [])
        assert len(server.context.responses) == 0
        await server.is_idle()


async def test_a_failure_before_the_first_event_has_its_status(serve: Serve) -> None:
    async with serve() as server:
        server.engine.fail_at = 0
        for stream in (False, True):
            assert (await respond(server, stream=stream)).status_code == 500
        assert len(server.context.responses) == 0


async def test_a_conversation_goes_on(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "one")
        first = (await respond(server, instructions="only now")).json()
        server.engine.script = say(tokenizer, "two")
        second = await respond(server, input="more", previous_response_id=first["id"], stream=True)
        final = events_of(second)[-1]["response"]
        assert final["previous_response_id"] == first["id"]
        # what came before stays known when the first of them is forgotten
        assert (await server.client.delete(f"/v1/responses/{first['id']}")).json() == {
            "id": first["id"],
            "object": "response",
            "deleted": True,
        }
        third = await respond(server, input="end", previous_response_id=final["id"], instructions="now this")
        assert third.status_code == 200
        assert prompt_of(server, tokenizer) == "".join(
            [
                "<|im_start|>system\nnow this<|im_end|>\n",
                "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n",
                "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n",
                "<|im_start|>user\nend<|im_end|>\n<|im_start|>assistant\n",
            ]
        )
        gone = await respond(server, previous_response_id=first["id"])
        assert gone.status_code == 400
        error = gone.json()["error"]
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
        for method in ("GET", "DELETE"):
            missing = await server.client.request(method, f"/v1/responses/{first['id']}")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "response_not_found")


async def test_what_is_not_to_be_kept_is_not(serve: Serve) -> None:
    async with serve() as server:
        body = (await respond(server, store=False, max_output_tokens=3)).json()
        assert body["store"] is False
        assert (await server.client.get(f"/v1/responses/{body['id']}")).status_code == 404
    async with serve(max_stored_responses=0) as server:
        body = (await respond(server, max_output_tokens=3)).json()
        assert body["store"] is False
        assert (await server.client.get(f"/v1/responses/{body['id']}")).status_code == 404
        refused = await respond(server, previous_response_id=body["id"])
        assert refused.json()["error"]["message"] == "this server keeps no responses to go on after"


async def test_a_conversation_that_grows_too_long(serve: Serve) -> None:
    async with serve() as server:
        items = [{"role": "user", "content": "a"}] * (MAX_MESSAGES - 2)
        first = (await respond(server, input=items, max_output_tokens=1)).json()
        refused = await respond(server, previous_response_id=first["id"], input=items[:2])
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["param"], "4097" in error["message"]) == ("previous_response_id", True)
        assert (await respond(server, previous_response_id=first["id"], max_output_tokens=1)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_too_large_is_not_kept_and_says_so(serve: Serve, stream: bool) -> None:
    async with serve(max_stored_bytes=2500) as server:
        for prompt, is_kept in (("short", True), ("long" * 500, False)):
            answer = await respond(server, input=prompt, max_output_tokens=3, stream=stream)
            body = events_of(answer)[-1]["response"] if stream else answer.json()
            assert body["store"] is is_kept
            got = await server.client.get(f"/v1/responses/{body['id']}")
            assert got.status_code == (200 if is_kept else 404)
            assert got.json() == body or not is_kept


async def test_nobody_sees_the_responses_of_another_key(serve: Serve) -> None:
    async with serve(api_key=[f"one = {KEY}", "two = sk-other"]) as server:
        mine, other = ({"authorization": f"Bearer {key}"} for key in (KEY, "sk-other"))
        server.client.headers = httpx.Headers(mine)
        body = (await respond(server, max_output_tokens=3)).json()
        path = f"/v1/responses/{body['id']}"
        for method in ("GET", "DELETE"):
            assert (await server.client.request(method, path, headers=other)).status_code == 404
        asked = {"input": "a", "previous_response_id": body["id"]}
        refused = await server.client.post("/v1/responses", json=asked, headers=other)
        assert refused.json()["error"]["code"] == "previous_response_not_found"
        assert (await server.client.get(path)).json() == body


async def test_items_are_messages(serve: Serve, tokenizer: Tokenizer) -> None:
    items = [
        {"role": "developer", "content": "rules"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}] * 2},
        {"role": "assistant", "content": [{"type": "output_text", "text": "calling"}], "status": None, "id": "msg_1"},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Köln"}'},
        {"type": "function_call", "call_id": "d", "name": "weather", "arguments": '{"city": "Bonn"}'},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
    ]
    async with serve(template=WITH_TOOLS) as server:
        assert (await respond(server, input=items, max_output_tokens=3)).status_code == 200
        assert prompt_of(server, tokenizer) == (
            "[system]rules[user]a\na[assistant]callingKölnBonn[tool]rain[assistant]"
        )


@pytest.mark.parametrize("burst", [1, 7, 500])
async def test_calls_of_tools(serve: Serve, tokenizer: Tokenizer, burst: int) -> None:
    async with serve(template=WITH_TOOLS) as server:
        server.engine.script, server.engine.burst = say(tokenizer, f"Let me see.\n{CALL}\n{CALL}"), burst
        whole = (await respond(server, tools=[WEATHER])).json()
        text, *calls = whole["output"]
        assert text["content"][0]["text"] == "Let me see."
        assert [(call["type"], call["name"], call["arguments"]) for call in calls] == [
            ("function_call", "weather", '{"city": "Köln"}')
        ] * 2
        assert whole["tools"] == [{**WEATHER, "strict": None}]
        events = events_of(await respond(server, tools=[WEATHER], stream=True))
        assert without_ids(events[-1]["response"]) == without_ids(whole)
        kinds = [event["type"].removeprefix("response.") for event in events]
        begun = kinds.index("output_item.added", kinds.index("output_item.done"))
        assert kinds[begun : begun + 4] == [
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ]
        assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1, 2]
        answered = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "rain"}
        await respond(server, input=[answered], previous_response_id=whole["id"])
        assert prompt_of(server, tokenizer) == "[user]hello[assistant]Let me see.KölnKöln[tool]rain[assistant]"
        single = (await respond(server, tools=[WEATHER], parallel_tool_calls=False)).json()
        assert len(single["output"]) == 2


async def test_a_forced_call(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(template=WITH_TOOLS) as server:
        server.engine.script = say(tokenizer, '{"name": "weather", "arguments": {"city": "Köln"}}')
        choice = {"type": "function", "name": "weather"}
        body = (await respond(server, tools=[WEATHER], tool_choice=choice)).json()
        assert [item["type"] for item in body["output"]] == ["function_call"]
        assert body["tool_choice"] == choice
        grammar = server.engine.requests[0].sampling.grammar
        assert grammar is not None
        assert '"city"' in grammar.source


async def test_a_format_is_the_engines_grammar(serve: Serve) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    async with serve() as server:
        body = (await respond(server, text={"format": form}, max_output_tokens=3)).json()
        assert body["text"] == {"format": form}
        grammar = server.engine.requests[0].sampling.grammar
        assert grammar is not None
        assert (grammar.kind, json.loads(grammar.source)) == ("json_schema", schema)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "text": "a"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "parameters": 5}]}, "tools[0].parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no"}}}},
            "text.format.schema",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"include": ["message.output_text.logprobs"], "tools": [WEATHER]}, "include"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "a"}}, "prompt"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"stop": ["a"]}, "stop"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 1000}, "max_output_tokens"),
        ({"input": "x" * 1000}, "input"),
        ({"metadata": {"a": "b"}, "model": "no-such"}, "model"),
        ({"tools": [{**WEATHER, "parameters": {"maximum": 2**70}}]}, "tools"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"maximum": 2**70}}}},
            "text.format.schema",
        ),
    ],
)
async def test_what_is_refused(serve: Serve, fields: dict[str, Any], param: str) -> None:
    async with serve(max_model_len=500) as server:
        response = await respond(server, **fields)
        assert response.status_code == (404 if param == "model" else 400), response.text
        error = response.json()["error"]
        assert error["param"] == param, error
        for name in ("messages", "max_completion_tokens", "response_format"):
            assert name not in error["message"]
        assert server.engine.requests == []


async def test_fields_without_effect(serve: Serve) -> None:
    async with serve() as server:
        fields = {"background": False, "reasoning": {}, "service_tier": "auto", "prompt_cache_key": "a", "x": 1}
        response = await respond(server, max_output_tokens=3, text={"verbosity": "medium"}, truncation="auto", **fields)
        assert response.status_code == 200, response.text


async def test_a_model_without_a_template(serve: Serve) -> None:
    async with serve(template=None) as server:
        error = (await respond(server)).json()["error"]
        assert error["param"] == "input"
        assert "--chat-template" in error["message"]


class City(BaseModel):
    name: str


async def test_the_official_client(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server, client_of(server) as client:
        server.engine.script = say(tokenizer, "one")
        created = await client.responses.create(input="hello")
        assert created.output_text == "one"
        assert await client.responses.retrieve(created.id) == created
        stream = await client.responses.create(input="b", previous_response_id=created.id, stream=True)
        events = [event async for event in stream]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "one"
        async with client.responses.stream(model=MODEL, input="hello") as helper:
            assert [event.type async for event in helper][-1] == "response.completed"
            assert (await helper.get_final_response()).output_text == "one"
        with pytest.raises(openai.BadRequestError, match="stream"):
            await client.responses.retrieve(created.id, stream=True)
        with pytest.raises(openai.BadRequestError, match="'include'"):
            await client.responses.retrieve(created.id, include=["message.output_text.logprobs"])
        with pytest.raises(openai.BadRequestError, match="'starting_after'"):
            await client.responses.retrieve(created.id, starting_after=1)
        await client.responses.delete(created.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(created.id)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(input="b", previous_response_id=created.id)
        assert refused.value.code == "previous_response_not_found"
        # what an answer holds is what the client knows
        Response.model_validate(created.model_dump(exclude={"store"}, warnings=False))


async def test_the_official_client_parses(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server, client_of(server) as client:
        server.engine.script = say(tokenizer, '{"name": "Köln"}')
        parsed = await client.responses.parse(input="hello", text_format=City)
        assert parsed.output_parsed == City(name="Köln")
        async with client.responses.stream(model=MODEL, input="hello", text_format=City) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == City(name="Köln")


async def test_the_official_client_sees_calls(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(template=WITH_TOOLS) as server, client_of(server) as client:
        server.engine.script = say(tokenizer, f"Look: {CALL}")
        async with client.responses.stream(model=MODEL, input="hello", tools=[{**WEATHER, "strict": True}]) as stream:  # type: ignore[list-item]
            final = await stream.get_final_response()
        message, call = final.output
        assert message.type == "message"
        assert isinstance(call, ResponseFunctionToolCall)
        assert json.loads(call.arguments) == {"city": "Köln"}


async def test_the_official_client_sees_a_failure(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server, client_of(server) as client:
        server.engine.script = say(tokenizer, "x" * 100)
        server.engine.fail_at = 3
        last = [event async for event in await client.responses.create(input="hello", stream=True)][-1]
        assert last.type == "response.failed"
        assert last.response.error is not None


async def test_a_client_that_leaves_frees_its_row(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script, server.engine.delay = say(tokenizer, "x" * 10_000), 0.01
        body = {"input": "hello", "stream": True}
        async with server.client.stream("POST", "/v1/responses", json=body) as response:
            async for _ in response.aiter_raw():
                break
        await server.is_idle()
        assert len(server.context.responses) == 0
