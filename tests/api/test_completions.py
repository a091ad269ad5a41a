"""Completions over a real socket: whole, streamed, and through the official client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.api.conftest import MODEL, Serve


@pytest.mark.anyio
async def test_a_whole_answer(serve: Serve) -> None:
    async with serve() as server:
        response = await server.complete(max_tokens=5)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        body = response.json()
        assert body["choices"][0]["text"] == "hello"
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 5
        assert body["model"] == MODEL
        await server.is_idle()


@pytest.mark.anyio
async def test_a_stream_ends_with_done(serve: Serve) -> None:
    async with serve() as server:
        response = await server.complete(max_tokens=5, stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        chunks = [json.loads(event) for event in events]
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "hello"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 5
        await server.is_idle()


@pytest.mark.anyio
async def test_the_official_client(serve: Serve) -> None:
    async with serve(api_key=["sk-right"]) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-right", max_retries=0) as client:
            whole = await client.completions.create(model=MODEL, prompt="hello", max_tokens=7)
            assert whole.choices[0].text == "hellohe"
            stream = await client.completions.create(model=MODEL, prompt="hello", max_tokens=7, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "hellohe"
            assert [model.id for model in (await client.models.list()).data] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="hello")
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.completions.create(model=MODEL, prompt="hello")


@pytest.mark.anyio
async def test_the_official_client_without_asyncio(serve: Serve) -> None:
    def ask(url: str) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = client.completions.create(
                model=MODEL, prompt=["hello", "fox"], n=2, max_tokens=3, logprobs=1, extra_body={"top_k": 5}
            )
            # sample k begins with token k of the prompt
            assert [choice.text for choice in whole.choices] == ["hel", "ell", "fox", "oxf"]
            assert whole.choices[0].logprobs is not None
            assert whole.choices[0].logprobs.tokens == ["h", "e", "l"]
            with client.completions.create(
                model=MODEL, prompt="hello", max_tokens=7, stream=True, stream_options={"include_usage": True}
            ) as stream:
                *chunks, last = stream
            assert "".join(chunk.choices[0].text for chunk in chunks) == "hellohe"
            assert last.usage is not None
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 7)
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(model=MODEL, prompt="hello", temperature=3)
            assert refused.value.param == "temperature"

    async with serve() as server:
        await asyncio.to_thread(ask, f"http://127.0.0.1:{server.port}/v1")
        assert server.engine.requests[0].sampling.top_k == 5
