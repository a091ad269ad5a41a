"""Writes docs/METRICS.md, every metric of the page that Prometheus reads, from that page itself: ``make docs``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.engine.interface import EngineClient, EngineStatus
from app.engine.request import EngineStats, ModelInfo
from app.metrics import ServerMetrics

METRICS = Path(__file__).resolve().parents[1] / "docs" / "METRICS.md"

_INTRODUCTION = """# Metrics

<!-- written by `make docs` -->

What `GET /metrics` tells, in Prometheus' text format. Names that begin with `vllm:` are those that routers and
autoscalers read. Labels hold nothing that a client sent. Counts of the engine begin anew when its process is started
again. Where the system tells it there are also `process_...`: memory, processor time and open files of the process that
answers.

"""
_HEAD = ("metric", "type", "labels", "meaning")


class _Engine:
    """As much of an engine as the page asks."""

    status = EngineStatus.READY
    stats = EngineStats()
    num_restarts = 0
    num_resumed = 0
    info = ModelInfo("", "MambaForCausalLM", 0, 0, 0, 0, "bfloat16", "float32", "cpu", 0, 0, None, (), None)

    def heartbeat_age(self) -> float:
        return 0.0

    def watch_queue(self, observer: Callable[[float], None]) -> None:
        """Nobody waits here."""


def families() -> list[Metric]:
    """Every metric, with a sample of each."""
    metrics = ServerMetrics(cast(EngineClient, _Engine()), "", lambda: True)
    metrics.on_finish("stop", 0, 0, 0.0)
    metrics.on_answer("/", "GET", 200)
    return list(text_string_to_metric_families(metrics.render().decode()))


def render() -> str:
    """The whole file."""
    rows = [row(family) for family in families() if not family.name.startswith("process_")]
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows)]
    return _INTRODUCTION + "\n".join(lines) + "\n"


def row(family: Metric) -> tuple[str, str, str, str]:
    """Name as queries have it, type, labels and meaning of a metric."""
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = sorted({label for sample in family.samples for label in sample.labels})
    kind = family.type
    if "le" in labels:
        labels.remove("le")
        bounds = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
        kind = f"{kind}, {bounds[0]} to {bounds[-2]} s"
    return f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), family.documentation


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    METRICS.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
