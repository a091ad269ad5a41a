"""What the metrics page says, without a server around it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.engine.interface import EngineStatus, EngineUnavailable
from app.engine.request import EngineStats, ModelInfo
from app.metrics import CheapHistogram, ServerMetrics
from scripts.metrics_table import METRICS, render


class Source:
    """An engine that is loading."""

    status = EngineStatus.STARTING
    on_wait: Callable[[float], None]
    stats = EngineStats(num_running=3, num_waiting=2, num_slots_used=3, num_slots=4, num_steps=7)
    num_restarts = 1
    num_resumed = 5

    @property
    def info(self) -> ModelInfo:
        raise EngineUnavailable("loading")

    def watch_queue(self, observer: Callable[[float], None]) -> None:
        self.on_wait = observer

    def heartbeat_age(self) -> float:
        return 0.25


def values(page: bytes) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_counts_while_the_model_loads() -> None:
    page = values(ServerMetrics(Source(), "fox", lambda: False).render())
    assert page[("vllm:num_requests_running", "fox")] == 3
    assert page[("vllm:num_requests_waiting", "fox")] == 2
    assert page[("vllm:kv_cache_usage_perc", "fox")] == 0.75
    assert (page[("mamba_slots", "used")], page[("mamba_slots", "free")]) == (3, 1)
    assert page[("mamba_engine_steps_total",)] == 7
    assert page[("mamba_engine_restarts_total",)] == 1
    assert page[("mamba_requests_resumed_total",)] == 5
    assert page[("mamba_ready",)] == 0
    assert ("mamba_state_bytes_per_sequence",) not in page


def test_observations() -> None:
    source = Source()
    metrics = ServerMetrics(source, "fox", lambda: True)
    source.on_wait(0.07)
    metrics.on_first_token(0.3)
    metrics.on_gaps(2, 0.004)
    metrics.on_finish("stop", 5, 3, 1.5)
    metrics.on_answer("/v1/completions", "POST", 200)
    page = values(metrics.render())
    assert page[("mamba_time_to_first_token_seconds_bucket", "0.2")] == 0
    assert page[("mamba_time_to_first_token_seconds_bucket", "0.5")] == 1
    assert page[("mamba_request_queue_time_seconds_bucket", "0.05")] == 0
    assert page[("mamba_request_queue_time_seconds_bucket", "0.1")] == 1
    assert page[("mamba_inter_token_latency_seconds_sum",)] == 0.008
    assert page[("mamba_inter_token_latency_seconds_count",)] == 2
    assert page[("mamba_prompt_tokens_total",)] == 5
    assert page[("mamba_generated_tokens_total",)] == 3
    assert page[("mamba_requests_finished_total", "stop")] == 1
    assert page[("mamba_http_requests_total", "POST", "/v1/completions", "200")] == 1


def test_the_table_of_metrics_is_current() -> None:
    assert render() == METRICS.read_text(encoding="utf-8"), "run `make docs`"


def test_the_cheap_histogram_equals_the_librarys() -> None:
    bounds = (0.001, 0.01, 0.1)
    cheap, ours, theirs = CheapHistogram("h", "text", bounds), CollectorRegistry(), CollectorRegistry()
    ours.register(cheap)
    library = Histogram("h", "text", buckets=bounds, registry=theirs)
    for value in (0.0, 0.001, 0.0011, 0.05, 0.1, 7.0):
        cheap.observe(value)
        library.observe(value)
    expected = {key: value for key, value in values(generate_latest(theirs)).items() if key[0] != "h_created"}
    assert values(generate_latest(ours)) == expected
