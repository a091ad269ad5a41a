"""What is served, told over a real socket."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.api.conftest import MODEL, Serve

pytestmark = pytest.mark.anyio
ALIAS = "fox"


async def test_the_models(serve: Serve) -> None:
    async with serve(served_model_name=[MODEL, ALIAS], max_model_len=50) as server:
        response = await server.client.get("/v1/models")
        assert response.status_code == 200
        listed = response.json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == [MODEL, ALIAS]
        for card in listed["data"]:
            assert (await server.client.get(f"/v1/models/{card['id']}")).json() == card
            assert (card["object"], card["root"], card["max_model_len"]) == ("model", MODEL, 50)
            assert card["state_bytes_per_sequence"] == 4096
        unknown = await server.client.get("/v1/models/other")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_no_limit_is_null(serve: Serve) -> None:
    async with serve() as server:
        assert (await server.client.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_the_official_client_without_asyncio(serve: Serve) -> None:
    def ask(url: str) -> list[str]:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("other")
            return [client.models.retrieve(model.id).id for model in client.models.list()]

    async with serve() as server:
        assert await asyncio.to_thread(ask, f"http://127.0.0.1:{server.port}/v1") == [MODEL]
