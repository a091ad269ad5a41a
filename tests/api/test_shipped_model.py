"""The model that ships, behind the server that ships, for the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.processes import Process, free_port
from tests.test_shipped_model import MODEL, PROMPTS


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    port = free_port()
    process = Process(["-m", "app", str(MODEL), "--port", str(port)], port)
    process.wait_ready()
    yield process
    process.kill()


@pytest.mark.slow
def test_32_streams_together_equal_32_requests_one_by_one(server: Process) -> None:
    asyncio.run(compare_together_and_alone(server.url))


async def compare_together_and_alone(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        def fields(number: int) -> dict[str, Any]:
            return {"model": MODEL.name, "prompt": PROMPTS[number], "max_tokens": 8 + number, "temperature": 0}

        async def stream(number: int) -> str:
            chunks = await client.completions.create(stream=True, **fields(number))
            return "".join([chunk.choices[0].text async for chunk in chunks])

        alone = [(await client.completions.create(**fields(number))).choices[0].text for number in range(32)]
        assert await asyncio.gather(*map(stream, range(32))) == alone
    assert len(set(alone)) > 16


@pytest.mark.slow
def test_a_suffix_says_what_has_to_come_before_it(server: Process) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {"model": MODEL.name, "max_tokens": 24, "temperature": 0}
        filled = client.completions.create(
            prompt="def area(width, ", suffix="):\n    return width * height\n", **fields
        )
        assert "height" in filled.choices[0].text
        plain = client.completions.create(prompt="def area(width, ", **fields)
        assert plain.choices[0].text != filled.choices[0].text
