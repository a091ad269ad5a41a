"""Metrics, counts, version, and the lines of the log."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import __version__
from app.logging import ConsoleFormatter, JsonFormatter
from tests.api.conftest import MODEL, Serve
from tests.api.test_disconnects import wait_for
from tests.fakes import FakeEngine

NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "mamba_time_to_first_token_seconds",
    "mamba_inter_token_latency_seconds",
    "mamba_request_queue_time_seconds",
    "mamba_e2e_request_latency_seconds",
    "mamba_prompt_tokens",
    "mamba_generated_tokens",
    "mamba_requests_finished",
    "mamba_http_requests",
    "mamba_slots",
    "mamba_engine_steps",
    "mamba_engine_prefill_tokens",
    "mamba_engine_decode_tokens",
    "mamba_engine_step_rows",
    "mamba_engine_step_prefill_tokens",
    "mamba_engine_restarts",
    "mamba_engine_heartbeat_age_seconds",
    "mamba_state_bytes_per_sequence",
    "mamba_ready",
    "mamba_build_info",
    "mamba_model_info",
    "process_resident_memory_bytes",
}


@pytest.mark.anyio
async def test_the_metrics_page(serve: Serve, engine: FakeEngine) -> None:
    async with serve() as server:
        for number in range(5):
            await server.complete(max_tokens=4, stream=number % 2 == 0, user=f"user-{number}")
            await server.client.get(f"/secret-{number}")
            await server.client.request(f"BREW{number}", "/v1/completions")
        response = await server.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(response.text)}
        assert set(families) >= NAMES
        samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families.values()
            for sample in family.samples
        }
        assert samples[("mamba_generated_tokens_total",)] == 20
        assert samples[("mamba_prompt_tokens_total",)] == 25
        assert samples[("mamba_requests_finished_total", ("reason", "length"))] == 5
        assert samples[("mamba_time_to_first_token_seconds_count",)] == 5
        assert samples[("mamba_inter_token_latency_seconds_count",)] == 15
        assert samples[("vllm:kv_cache_usage_perc", ("model_name", MODEL))] == 0
        assert samples[("mamba_slots", ("state", "free"))] == engine.info.max_num_seqs
        route = (("method", "POST"), ("route", "/v1/completions"), ("status", "200"))
        assert samples[("mamba_http_requests_total", *route)] == 5
        other = (("method", "other"), ("route", "other"))
        assert samples[("mamba_http_requests_total", *other, ("status", "404"))] == 5
        assert "secret" not in response.text
        assert "user-" not in response.text
        assert "BREW" not in response.text


@pytest.mark.anyio
async def test_version_and_load(serve: Serve) -> None:
    async with serve() as server:
        assert (await server.client.get("/version")).json() == {"version": __version__}
        load = (await server.client.get("/load")).json()
        assert load["ready"] is True
        assert load["num_slots"] == 8


@pytest.mark.anyio
async def test_the_access_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.access")
    async with serve() as server:
        for stream in (False, True):
            caplog.clear()
            await server.client.post(
                "/v1/completions?key=secret",
                json={"prompt": "hello", "max_tokens": 4, "stream": stream},
                headers={"x-request-id": "mine"},
            )
            (record,) = [record for record in caplog.records if record.name == "app.access"]
            assert record.getMessage() == "POST /v1/completions 200"
            assert vars(record)["duration_ms"] > 0
            assert vars(record)["prompt_tokens"] == 5
            assert vars(record)["generated_tokens"] == 4
            assert vars(record)["finish"] == "length"
        caplog.clear()
        await server.client.get("/x%0aforged")
        (record,) = [record for record in caplog.records if record.name == "app.access"]
        assert "\n" not in ConsoleFormatter().format(record)
        caplog.clear()
        await server.client.get("/readyz")
        assert not [record for record in caplog.records if record.name == "app.access"]
    async with serve(disable_access_log=True) as server:
        caplog.clear()
        await server.client.get("/version")
        assert not [record for record in caplog.records if record.name == "app.access"]


def test_a_json_line() -> None:
    record = logging.LogRecord("app.x", logging.WARNING, __file__, 1, "a %s", ("b\n",), None)
    record.__dict__["num_rows"] = 3
    line = JsonFormatter().format(record)
    assert "\n" not in line
    content = json.loads(line)
    assert content["message"] == "a b\n"
    assert content["level"] == "warning"
    assert content["num_rows"] == 3
    assert content["time"].endswith("Z")


@pytest.mark.anyio
async def test_the_load_that_others_call_by_another_name(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 60.0
    async with serve() as server:
        running = [asyncio.create_task(server.complete()) for _ in range(3)]
        await wait_for(lambda: len(engine.live) == 3)
        load = (await server.client.get("/load")).json()
        assert load["server_load"] == load["num_open_requests"] == 3
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await server.is_idle()
        assert (await server.client.get("/load")).json()["server_load"] == 0


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/v1/models", "/version", "/docs", "/nothing"])
async def test_head_is_get_without_a_body(serve: Serve, path: str) -> None:
    async with serve() as server:
        head, get = await server.client.head(path), await server.client.get(path)
        assert head.status_code == get.status_code
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers["content-length"] == str(len(get.content))
        assert head.content == b""
        assert head.headers["x-request-id"]


@pytest.mark.anyio
async def test_what_a_route_takes_is_told(serve: Serve) -> None:
    async with serve() as server:
        response = await server.client.post("/livez")
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
        for method in ("HEAD", "GET", "DELETE"):
            response = await server.client.request(method, "/v1/completions")
            assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.anyio
@pytest.mark.parametrize("root_path", ["", "/mamba"])
async def test_every_name_of_the_model_works_everywhere(serve: Serve, root_path: str) -> None:
    names = ["main", "acme/fox", "fox-1"]
    async with serve(served_model_name=names, root_path=root_path) as server:
        # the path of the proxy may be cut off or not
        for prefix in {"", root_path}:
            cards = (await server.client.get(prefix + "/v1/models")).json()["data"]
            assert [(card["id"], card["root"]) for card in cards] == [(name, "main") for name in names]
            for name in names:
                card = await server.client.get(f"{prefix}/v1/models/{name}")
                assert card.json()["id"] == name
                body = {"prompt": "hello", "model": name, "max_tokens": 1}
                answer = await server.client.post(prefix + "/v1/completions", json=body)
                assert answer.json()["model"] == name
                assert (await server.client.post(prefix + "/tokenize", json=body)).json()["count"] == 5
                ids = {"tokens": [1], "model": name}
                assert (await server.client.post(prefix + "/detokenize", json=ids)).status_code == 200
            other = {"prompt": "hello", "tokens": [1], "model": "other"}
            for path in ("/v1/completions", "/tokenize", "/detokenize"):
                response = await server.client.post(prefix + path, json=other)
                assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
