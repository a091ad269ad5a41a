"""Conversations over a real socket: whole, streamed, and through the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from app.engine.request import GenerationRequest
from app.serving.chat_template import ChatTemplate, TemplateSource
from app.serving.tokenizer import Tokenizer
from tests.api.conftest import MODEL, Running, Serve

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WITH_TOOLS = ChatTemplate(
    TemplateSource(
        {
            "default": "{% if tools %}{{ tools | tojson }}{% endif %}"
            "{% for message in messages %}[{{ message.role }}]{{ message.content or '' }}"
            "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        }
    )
)


def say(tokenizer: Tokenizer, *texts: str) -> Callable[[GenerationRequest, int], Iterable[int]]:
    """A script in which sample k says one of the texts, again and again."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return lambda _, sample: ids[sample % len(ids)]


async def chat(server: Running, **fields: Any) -> httpx.Response:
    return await server.client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def chunks_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return map(json.loads, events)


def client_of(server: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def prompt_of(server: Running, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(server.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_a_whole_answer(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "Grüße!")
        response = await chat(server)
        assert response.status_code == 200
        body = response.json()
        assert body["id"].startswith("chatcmpl-")
        assert body["object"] == "chat.completion"
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Grüße!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ]
        assert body["usage"]["prompt_tokens"] == len(server.engine.requests[0].prompt_token_ids)
        expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert prompt_of(server, tokenizer) == expected
        assert server.engine.requests[0].max_tokens == 2**31 - 1
        await server.is_idle()


async def test_a_stream_begins_with_the_role_of_each_choice(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "one", "two")
        response = await chat(server, n=2, stream=True, stream_options={"include_usage": True})
        *chunks, last = chunks_of(response)
        texts = {0: "", 1: ""}
        for index in texts:
            deltas = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
            assert all("role" not in choice["delta"] for choice in deltas[1:])
            texts[index] = "".join(choice["delta"].get("content", "") for choice in deltas)
            assert [choice["finish_reason"] for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]
        assert texts == {0: "one", 1: "two"}
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 8


async def test_limits_of_length(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(max_model_len=100) as server:
        server.engine.script = say(tokenizer, "x" * 100)
        assert (await chat(server)).json()["usage"]["total_tokens"] == 100
        for name in ("max_completion_tokens", "max_tokens"):
            assert (await chat(server, **{name: 3})).json()["usage"]["completion_tokens"] == 3
            refused = await chat(server, **{name: 99})
            assert refused.status_code == 400
            assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == (
                "context_length_exceeded",
                name,
            )
        both = await chat(server, max_tokens=9, max_completion_tokens=4)
        assert both.json()["usage"]["completion_tokens"] == 4
        long = await chat(server, messages=[{"role": "user", "content": "x" * 200}])
        assert long.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_logprobs(serve: Serve, is_stream: bool) -> None:
    async with serve() as server:
        response = await chat(server, max_tokens=3, logprobs=True, top_logprobs=2, stream=is_stream)
        if is_stream:
            choices = [choice for chunk in chunks_of(response) for choice in chunk["choices"]]
            content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        else:
            content = response.json()["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content] == ["<", "|", "i"]
        assert [entry["bytes"] for entry in content] == [[60], [124], [105]]
        assert {entry["logprob"] for entry in content} == {-0.5}
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.0]


async def test_a_model_without_a_template(serve: Serve) -> None:
    async with serve(template=None) as server:
        response = await chat(server)
        assert response.status_code == 400
        assert "--chat-template" in response.json()["error"]["message"]
        assert server.engine.requests == []
        assert (await server.complete()).status_code == 200


async def test_going_on_with_the_last_message(serve: Serve, tokenizer: Tokenizer) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am  "}]
    async with serve() as server:
        await chat(server, messages=messages, continue_final_message=True, max_tokens=1)
        assert prompt_of(server, tokenizer).endswith("<|im_start|>assistant\nI am  ")
        await chat(server, add_generation_prompt=False, max_tokens=1)
        assert prompt_of(server, tokenizer).endswith("hello<|im_end|>\n")
        both = await chat(server, messages=messages, continue_final_message=True, add_generation_prompt=True)
        assert both.status_code == 400


async def test_control_tokens_in_messages_are_text(serve: Serve, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        TemplateSource({"default": "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"})
    )
    async with serve(template=template) as server:
        await chat(server, messages=[{"role": "user", "content": "a<|endoftext|>b"}], max_tokens=1)
        ids = server.engine.requests[0].prompt_token_ids
        assert ids[-1] == 256
        assert 256 not in ids[:-1]
        assert prompt_of(server, tokenizer) == "a<|endoftext|>b<|endoftext|>"


async def test_the_end_of_a_message_that_is_no_token_is_cut(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve() as server:
        server.engine.script = say(tokenizer, "fine<|im_end|>\n<|im_start|>user")
        choice = (await chat(server)).json()["choices"][0]
        assert choice["message"]["content"] == "fine"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        own = (await chat(server, stop=["<|im_end|>"])).json()["choices"][0]
        assert own["stop_reason"] == "<|im_end|>"


async def test_tools(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(template=WITH_TOOLS) as server:
        server.engine.script = say(tokenizer, f"Let me see.\n{CALL}")
        body = (await chat(server, tools=[WEATHER])).json()
        message = body["choices"][0]["message"]
        assert message["content"] == "Let me see."
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Köln"}
        assert body["choices"][0]["finish_reason"] == "tool_calls"
        assert '"name": "weather"' in prompt_of(server, tokenizer)
        answered = [*HELLO, message, {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]
        assert (await chat(server, messages=answered, tools=[WEATHER])).status_code == 200
        assert "[assistant]Let me see.Köln[tool]rain[assistant]" in prompt_of(server, tokenizer)
        # without an offer there is nothing to look for
        silent = (await chat(server, tools=[WEATHER], tool_choice="none")).json()["choices"][0]
        assert silent["message"]["content"] == f"Let me see.\n{CALL}"
        assert "weather" not in prompt_of(server, tokenizer)


async def test_a_forced_call_is_held_to_its_form(serve: Serve, tokenizer: Tokenizer) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    async with serve(template=WITH_TOOLS) as server:
        server.engine.script = say(tokenizer, '{"name": "weather", "arguments": {"city": "Ulm"}}')
        for choice in ("required", named):
            body = (await chat(server, tools=[WEATHER], tool_choice=choice)).json()
            (call,) = body["choices"][0]["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"city": "Ulm"}
            assert body["choices"][0]["message"]["content"] is None
            assert prompt_of(server, tokenizer).endswith("[assistant]<tool_call>\n")
            grammar = server.engine.requests[-1].sampling.grammar
            assert grammar is not None
            assert json.loads(grammar.source)["properties"]["name"] == {"const": "weather"}
        refused = await chat(server, tools=[WEATHER], tool_choice=named, response_format={"type": "json_object"})
        assert refused.json()["error"]["param"] == "tool_choice"
        odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "strin"}}}
        refused = await chat(server, tools=[odd], tool_choice="required")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tools"


async def test_definitions_of_arguments_stand_where_references_look(serve: Serve, tokenizer: Tokenizer) -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "$defs": {"City": {"type": kind}},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    async with serve() as server:
        server.engine.script = say(tokenizer, '{"name": "f", "arguments": {"city": "Ulm"}}')
        fields = {"tools": [tool("f", "string"), tool("g", "string")], "tool_choice": "required"}
        assert (await chat(server, **fields)).json()["choices"][0]["finish_reason"] == "tool_calls"
        grammar = server.engine.requests[-1].sampling.grammar
        assert grammar is not None
        schema = json.loads(grammar.source)
        assert schema["$defs"] == {"City": {"type": "string"}}
        assert [each["properties"]["name"]["const"] for each in schema["anyOf"]] == ["f", "g"]
        fields["tools"] = [tool("f", "string"), tool("g", "number")]
        refused = await chat(server, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


async def test_tools_without_a_place_in_the_template_are_refused(serve: Serve) -> None:
    template = ChatTemplate(TemplateSource({"default": "{{ messages[0].content }}"}))
    async with serve(template=template) as server:
        response = await chat(server, tools=[WEATHER])
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
        assert (await chat(server, tools=[WEATHER], tool_choice="none", max_tokens=1)).status_code == 200


async def test_variables_of_the_template_need_the_operator(serve: Serve, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TemplateSource({"default": "{{ mood }}{{ messages[0].content }}"}))
    async with serve(template=template) as server:
        refused = await chat(server, chat_template_kwargs={"mood": "glad"})
        assert refused.json()["error"]["param"] == "chat_template_kwargs"
    async with serve(template=template, enable_chat_template_kwargs=True) as server:
        await chat(server, chat_template_kwargs={"mood": "glad"}, max_tokens=1)
        assert prompt_of(server, tokenizer) == "gladhello"
        refused = await chat(server, chat_template_kwargs={"messages": []})
        assert refused.json()["error"]["param"] == "chat_template_kwargs"


async def test_a_template_without_end_ends(serve: Serve) -> None:
    loop = "{% for i in range(60000) %}{% for j in range(60000) %}{% endfor %}{% endfor %}"
    async with serve(template=ChatTemplate(TemplateSource({"default": loop}))) as server:
        response = await chat(server)
        assert response.status_code == 400
        assert "took too long" in response.json()["error"]["message"]
        assert (await server.client.get("/livez")).status_code == 200
        await server.is_idle()


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ messages }}"},
        {"documents": [{"text": "a"}]},
        {"reasoning_effort": "high"},
        {"store": True},
        {"service_tier": "flex"},
        {"modalities": ["audio"]},
        {"audio": {"voice": "x"}},
        {"prediction": {"type": "content"}},
        {"web_search_options": {}},
        {"functions": [{"name": "f"}]},
        {"function_call": "auto"},
        {"prompt": "x"},
    ],
)
async def test_what_is_known_but_not_served_is_refused_by_name(serve: Serve, fields: dict[str, Any]) -> None:
    async with serve() as server:
        response = await chat(server, **fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(fields))
        assert response.json()["error"]["code"] == "unsupported_parameter"


async def test_what_has_no_effect_is_taken(serve: Serve) -> None:
    async with serve() as server:
        fields = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "modalities": ["text"], "user": "me"}
        assert (await chat(server, max_tokens=1, **fields)).status_code == 200


class Forecast(BaseModel):
    city: str
    degrees: int


async def test_the_official_client(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(template=WITH_TOOLS) as server, client_of(server) as client:
        server.engine.script = say(tokenizer, "Hi there.")
        whole = await client.chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == "Hi there."
        async with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:  # type: ignore[arg-type]
            deltas = [event.delta async for event in stream if event.type == "content.delta"]
            final = await stream.get_final_completion()
        assert "".join(deltas) == final.choices[0].message.content == "Hi there."

        server.engine.script = say(tokenizer, '{"city": "Ulm", "degrees": 9}')
        parsed = await client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Forecast)  # type: ignore[arg-type]
        assert parsed.choices[0].message.parsed == Forecast(city="Ulm", degrees=9)


async def test_the_official_client_streams_calls(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(template=WITH_TOOLS) as server, client_of(server) as client:
        server.engine.script = say(tokenizer, f"{CALL}\n{CALL}")
        async with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER]) as stream:  # type: ignore[arg-type,list-item]
            final = await stream.get_final_completion()
        choice = final.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        assert [call.function.name for call in choice.message.tool_calls] == ["weather", "weather"]
        assert len({call.id for call in choice.message.tool_calls}) == 2
        assert json.loads(choice.message.tool_calls[1].function.arguments) == {"city": "Köln"}
        single = await client.chat.completions.create(
            model=MODEL,
            messages=HELLO,  # type: ignore[arg-type]
            tools=[WEATHER],  # type: ignore[list-item]
            parallel_tool_calls=False,
        )
        assert single.choices[0].message.tool_calls is not None
        assert len(single.choices[0].message.tool_calls) == 1


async def test_the_official_client_without_asyncio(serve: Serve) -> None:
    messages: Any = HELLO

    def ask(url: str) -> list[str | None]:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
            chunks = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5, stream=True)
            return [whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)]

    async with serve() as server:
        assert await asyncio.to_thread(ask, f"http://127.0.0.1:{server.port}/v1") == ["<|im_", "<|im_"]


async def test_the_official_client_helps_without_asyncio(serve: Serve, tokenizer: Tokenizer) -> None:
    messages: Any = HELLO

    def ask(url: str) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            completions = client.chat.completions
            parsed = completions.parse(model=MODEL, messages=messages, response_format=Forecast)
            assert parsed.choices[0].message.parsed == Forecast(city="Ulm", degrees=9)
            with completions.stream(model=MODEL, messages=messages, response_format=Forecast) as stream:
                events = list(stream)
            assert events[-1].type == "content.done"
            assert events[-1].parsed == Forecast(city="Ulm", degrees=9)
            raw = completions.with_raw_response.create(model=MODEL, messages=messages)
            assert raw.headers["x-request-id"]

    def call(url: str) -> None:
        tool = openai.pydantic_function_tool(Forecast, name="weather")
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            parsed = client.chat.completions.parse(model=MODEL, messages=messages, tools=[tool])
            calls = parsed.choices[0].message.tool_calls
            assert calls is not None
            assert calls[0].function.parsed_arguments == Forecast(city="Ulm", degrees=9)

    async with serve(template=WITH_TOOLS) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        arguments = '{"city": "Ulm", "degrees": 9}'
        server.engine.script = say(tokenizer, arguments)
        await asyncio.to_thread(ask, url)
        server.engine.script = say(tokenizer, f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>')
        await asyncio.to_thread(call, url)
