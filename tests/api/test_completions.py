"""Completions over a real socket: whole, streamed, and through the official client."""

from __future__ import annotations

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
