"""The load generator counts what the server sent, and says so when it fails."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import serve as benchmark
from tests.api.conftest import MODEL, Serve
from tests.fakes import FakeEngine


def make_load(port: int, **fields: object) -> benchmark.Load:
    defaults: dict[str, object] = {
        "host": "127.0.0.1",
        "port": port,
        "api_key": None,
        "model": MODEL,
        "concurrency": 3,
        "num_requests": 7,
        "num_prompt_tokens": 5,
        "max_tokens": 9,
        "max_token_id": 250,
        "temperature": 0.0,
        "seed": 0,
    }
    return benchmark.Load(**{**defaults, **fields})  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_it_counts_tokens_and_times(serve: Serve, engine: FakeEngine) -> None:
    engine.delay = 0.02
    async with serve() as server:
        load = make_load(server.port)
        outcome = await benchmark.run_load(load)
        assert outcome.errors == []
        assert (outcome.num_answers, outcome.num_tokens) == (7, 63)
        assert len(outcome.first_tokens) == 7
        assert all(0.02 < seconds < 1 for seconds in outcome.first_tokens)
        line = benchmark.report(load, 1, outcome)
        assert 20 <= line["inter_token_ms"]["p50"] < 60
        assert line["tokens_per_s"] == pytest.approx(63 / line["seconds"], rel=0.01)
        await server.is_idle()


@pytest.mark.anyio
async def test_it_says_what_failed(serve: Serve, engine: FakeEngine) -> None:
    engine.fail_at = 3
    async with serve() as server:
        outcome = await benchmark.run_load(make_load(server.port))
        assert len(outcome.errors) == 7
        assert "server_error" in outcome.errors[0]
        outcome = await benchmark.run_load(make_load(server.port, model="other", num_requests=2))
        assert "model_not_found" in outcome.errors[0]
        assert outcome.num_answers == 0
    outcome = await benchmark.run_load(make_load(server.port, num_requests=1))
    assert len(outcome.errors) == 1


@pytest.mark.anyio
async def test_from_the_command_line(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    async with serve(api_key=["sk-right"]) as server:
        url = f"http://127.0.0.1:{server.port}"
        arguments = ["--url", url, "--concurrency", "1,3", "--num-requests", "4", "--max-tokens", "5"]
        code = await asyncio.to_thread(benchmark.main, [*arguments, "--processes", "2", "--api-key", "sk-right"])
        assert code == 0
        first, second = map(json.loads, capsys.readouterr().out.splitlines())
        assert (first["concurrency"], first["processes"], first["num_tokens"]) == (1, 1, 20)
        assert (second["concurrency"], second["processes"], second["num_requests"]) == (3, 2, 4)


def test_shares_add_up() -> None:
    shares = benchmark.split(make_load(1, concurrency=7, num_requests=30), 4)
    assert [share.concurrency for share in shares] == [2, 2, 2, 1]
    assert sum(share.num_requests for share in shares) == 30
    assert len({share.seed for share in shares}) == 4
    assert len(benchmark.split(make_load(1, concurrency=2), 4)) == 2


def test_quantiles() -> None:
    values = [i / 1e3 for i in range(1, 101)]
    assert (benchmark.quantile(values, 0.5), benchmark.quantile(values, 0.99)) == (51.0, 100.0)
    assert benchmark.quantile(values, 1.0) == 100.0
    assert benchmark.quantile([], 0.5) is None
