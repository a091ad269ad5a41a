"""Metrics, counts, version, and the lines of the log."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import __version__
from app.logging import ConsoleFormatter, JsonFormatter
from tests.api.conftest import MODEL, Serve
from tests.fakes import FakeEngine

NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "mamba_time_to_first_token_seconds",
    "mamba_inter_token_latency_seconds",
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
