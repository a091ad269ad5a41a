"""LangChain's chat model and LLM against the server, neither of which may reach for anything else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from app.engine.request import GenerationRequest
from app.serving.tokenizer import Tokenizer
from tests.api.conftest import MODEL, Running, Serve
from tests.api.test_chat import CALL, WITH_TOOLS, Forecast, prompt_of, say

pytestmark = pytest.mark.anyio

TRACING = ("TRACING", "TRACING_V2", "GATEWAY")
FORECAST = '{"city": "Ulm", "degrees": 9}'


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing but 127.0.0.1 is looked up or connected to, by whatever thread: no traces, no vocabularies."""
    strangers: list[Any] = []

    def guard(name: str, owner: Any, position: int) -> None:
        original = getattr(owner, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            place = args[position]
            host = place[0] if isinstance(place, tuple) else place
            if host != "127.0.0.1":
                strangers.append(place)
                raise ConnectionRefusedError(f"{place} is not of this test")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for name in TRACING:
        for prefix in ("LANGSMITH", "LANGCHAIN"):
            monkeypatch.delenv(f"{prefix}_{name}", raising=False)
    guard("getaddrinfo", socket, 0)
    guard("connect", socket.socket, 1)
    guard("connect_ex", socket.socket, 1)
    yield
    assert strangers == []


@asynccontextmanager
async def model_of(kind: type[Any], server: Running, **fields: Any) -> AsyncIterator[Any]:
    """A model of LangChain's whose connections end here, and not with the process."""
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.DefaultHttpxClient() as client:
        async with openai.DefaultAsyncHttpxClient() as async_client:
            own = {"http_client": client, "http_async_client": async_client, "max_retries": 0}
            yield kind(model=MODEL, base_url=url, api_key="none", **own, **fields)


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


async def test_a_chat_model(serve: Serve, tokenizer: Tokenizer) -> None:
    async with (
        serve() as server,
        model_of(ChatOpenAI, server, temperature=0.5, max_tokens=40, seed=3, logprobs=True, top_logprobs=2) as model,
    ):
        server.engine.script = say(tokenizer, "Grüße! And more")
        conversation = [SystemMessage("Be kind."), HumanMessage("hello")]
        answers = [
            await asyncio.to_thread(model.invoke, conversation, stop=["!"]),
            await model.ainvoke(conversation, stop=["!"]),
        ]
        expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert prompt_of(server, tokenizer) == expected
        for answer, request in zip(answers, server.engine.requests, strict=True):
            assert isinstance(answer, AIMessage)
            assert answer.content == "Grüße"
            assert answer.response_metadata["finish_reason"] == "stop"
            assert answer.response_metadata["model_name"] == MODEL
            assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
            assert answer.usage_metadata is not None
            assert answer.usage_metadata["input_tokens"] == len(request.prompt_token_ids)
            assert (request.sampling.temperature, request.sampling.seed, request.max_tokens) == (0.5, 3, 40)


async def test_a_chat_model_streams(serve: Serve, tokenizer: Tokenizer) -> None:
    def read(model: ChatOpenAI) -> list[AIMessageChunk]:
        return list(model.stream("hello"))

    async with serve() as server, model_of(ChatOpenAI, server, stream_usage=True) as model:
        server.engine.script = say(tokenizer, "Grüße!")
        for chunks in (await asyncio.to_thread(read, model), [chunk async for chunk in model.astream("hello")]):
            texts = [chunk.content for chunk in chunks if chunk.content]
            assert texts == list("Grüße!")
            whole = sum(chunks[1:], start=chunks[0])
            assert whole.response_metadata["finish_reason"] == "stop"
            assert whole.usage_metadata is not None
            # one token for each byte, and the end
            assert whole.usage_metadata["output_tokens"] == len("Grüße!".encode()) + 1


async def test_a_chat_model_takes_many(serve: Serve, tokenizer: Tokenizer) -> None:
    def repeat_question(request: GenerationRequest, _: int) -> list[int]:
        text = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        question = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        return tokenizer.encode(question, add_special_tokens=False)

    questions = ["one", "two", "three", "four"]
    async with serve() as server, model_of(ChatOpenAI, server) as model:
        server.engine.script = repeat_question
        for answers in (await asyncio.to_thread(model.batch, questions), await model.abatch(questions)):
            assert [answer.content for answer in answers] == questions
        assert len(server.engine.requests) == 8


async def test_a_chat_model_calls_tools(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(template=WITH_TOOLS) as server, model_of(ChatOpenAI, server) as plain:
        model = plain.bind_tools([weather])
        server.engine.script = say(tokenizer, f"Let me see.\n{CALL}")
        answer = await model.ainvoke("hello")
        assert answer.content == "Let me see."
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Köln"})
        assert answer.response_metadata["finish_reason"] == "tool_calls"

        result = await weather.ainvoke(call)
        assert isinstance(result, ToolMessage)
        server.engine.script = say(tokenizer, "Rain.")
        last = await asyncio.to_thread(model.invoke, [HumanMessage("hello"), answer, result])
        assert last.content == "Rain."
        assert "[assistant]Let me see.Köln[tool]rain in Köln[assistant]" in prompt_of(server, tokenizer)

        server.engine.script = say(tokenizer, f"{CALL}\n{CALL}")
        chunks = [chunk async for chunk in model.astream("hello")]
        streamed = sum(chunks[1:], start=chunks[0]).tool_calls
        assert [(call["name"], call["args"]) for call in streamed] == [("weather", {"city": "Köln"})] * 2

        server.engine.script = say(tokenizer, '{"name": "weather", "arguments": {"city": "Ulm"}}')
        for choice in ("any", "weather"):
            forced = await plain.bind_tools([weather], tool_choice=choice).ainvoke("hello")
            assert forced.tool_calls[0]["args"] == {"city": "Ulm"}


# what it parsed, LangChain writes out again as if it were a plain answer
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
async def test_a_chat_model_keeps_to_a_form(serve: Serve, tokenizer: Tokenizer, method: str) -> None:
    said = f'{{"name": "Forecast", "arguments": {FORECAST}}}' if method == "function_calling" else FORECAST
    async with serve(template=WITH_TOOLS) as server, model_of(ChatOpenAI, server) as plain:
        model = plain.with_structured_output(Forecast, method=method)
        server.engine.script = say(tokenizer, said)
        expected = Forecast(city="Ulm", degrees=9)
        assert await model.ainvoke("hello") == expected
        assert await asyncio.to_thread(model.invoke, "hello") == expected
        assert [part async for part in model.astream("hello")][-1] == expected
        for request in server.engine.requests:
            grammar = request.sampling.grammar
            assert grammar is not None
            assert ("degrees" in grammar.source) == (method != "json_mode")


async def test_a_chat_model_speaks_responses(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(template=WITH_TOOLS) as server, model_of(ChatOpenAI, server, use_responses_api=True) as model:
        server.engine.script = say(tokenizer, "Grüße!")
        answer = await model.ainvoke("hello")
        assert (answer.text, answer.response_metadata["id"][:5]) == ("Grüße!", "resp_")
        chunks = [chunk async for chunk in model.astream("hello")]
        assert "".join(chunk.text for chunk in chunks) == "Grüße!"
        server.engine.script = say(tokenizer, CALL)
        calling = await asyncio.to_thread(model.bind_tools([weather]).invoke, "hello")
        assert [(call["name"], call["args"]) for call in calling.tool_calls] == [("weather", {"city": "Köln"})]


async def test_errors_are_what_langchain_knows(serve: Serve) -> None:
    async with serve(max_model_len=60) as server, model_of(ChatOpenAI, server) as model:
        with pytest.raises(ContextOverflowError) as too_long:
            await model.ainvoke("x" * 100)
        assert isinstance(too_long.value, openai.BadRequestError)
        assert too_long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as refused:
            await model.ainvoke("hello", temperature=3)
        assert refused.value.param == "temperature"
        assert server.engine.requests == []


async def test_an_llm(serve: Serve) -> None:
    async with serve() as server, model_of(OpenAI, server, max_tokens=7, temperature=0.5, seed=3) as model:
        assert await asyncio.to_thread(model.invoke, "hello") == "hellohe"
        assert await model.ainvoke("hello", stop=["oh"]) == "hell"
        request = server.engine.requests[0]
        assert (request.sampling.temperature, request.sampling.seed, request.max_tokens) == (0.5, 3, 7)
        assert await asyncio.to_thread(lambda: list(model.stream("hello"))) == list("hellohe")
        assert [text async for text in model.astream("hello")] == list("hellohe")
        assert await model.abatch(["hello", "fox"]) == ["hellohe", "foxfoxf"]


async def test_an_llm_gives_several_answers(serve: Serve) -> None:
    async with serve() as server, model_of(OpenAI, server, max_tokens=5, n=2, best_of=2, logprobs=1) as model:
        for result in (
            await asyncio.to_thread(model.generate, ["hello", "fox"]),
            await model.agenerate(["hello", "fox"]),
        ):
            texts = [[generation.text for generation in answers] for answers in result.generations]
            # sample k begins with token k of the prompt
            assert texts == [["hello", "elloh"], ["foxfo", "oxfox"]]
            info = result.generations[0][0].generation_info
            assert info is not None
            assert info["finish_reason"] == "length"
            assert info["logprobs"]["tokens"] == list("hello")
            assert result.llm_output is not None
            assert result.llm_output["token_usage"] == {"prompt_tokens": 8, "completion_tokens": 20, "total_tokens": 28}
