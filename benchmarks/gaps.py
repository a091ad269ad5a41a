"""The pause of the device between the decode steps of an engine: from the end of one graph to the start of the next.

    python -m benchmarks.gaps --random 130m --batch 1,64,256

``host_us`` is what the host does for a step, waiting for the device left out: while it is less than the step takes,
the device need not pause.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from app.engine.engine import Engine
from app.engine.graphs import GraphSteps
from app.engine.host import DeviceMark
from benchmarks.decode import WARM_UP_STEPS, start_rows
from benchmarks.in_process import Subject, add_arguments, drain, load_subject, numbers, print_line
from benchmarks.ops import captured

_NUM_BARE_REPLAYS = 50


class Recorder:
    """Marks before and behind every replay of the graphs of all engines, while it is active."""

    def __init__(self) -> None:
        self.spans: list[tuple[DeviceMark, DeviceMark]] = []
        self._steps: Any = GraphSteps
        self._replay = GraphSteps.replay

    def __enter__(self) -> Recorder:
        recorder, replay = self, self._replay

        def marked(steps: GraphSteps, graph: torch.cuda.CUDAGraph) -> None:
            before = DeviceMark()
            replay(steps, graph)
            recorder.spans.append((before, DeviceMark()))

        self._steps.replay = marked
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.replay = self._replay

    def seconds(self) -> tuple[list[float], list[float]]:
        """Of the steps, and of the gaps between them."""
        self.spans[-1][1].wait()
        steps = [behind.seconds_since(before) for before, behind in self.spans]
        gaps = [later[0].seconds_since(earlier[1]) for earlier, later in zip(self.spans, self.spans[1:], strict=False)]
        return steps, gaps


class HostClock:
    """Time of the host inside ``step``, without that spent waiting for the device."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._mark: Any = DeviceMark
        self._wait = DeviceMark.wait

    def __enter__(self) -> HostClock:
        clock, wait = self, self._wait

        def timed(mark: DeviceMark) -> None:
            start = time.perf_counter()
            wait(mark)
            clock.waited += time.perf_counter() - start

        self._mark.wait = timed
        return self

    def __exit__(self, *_: object) -> None:
        self._mark.wait = self._wait


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch", type=numbers(int), default=[1, 64, 256], help="rows that decode together")
    parser.add_argument("--tokens", type=int, default=256, help="steps to watch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    return parser.parse_args(arguments)


def run_case(subject: Subject, engine: Engine, num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    start_rows(engine, num_rows, options, subject.config.vocab_size)
    for _ in range(WARM_UP_STEPS):
        engine.step()
    host, periods = [], []
    with Recorder() as recorder, HostClock() as clock:
        for _ in range(options.tokens):
            start, waited = time.perf_counter(), clock.waited
            engine.step()
            periods.append(time.perf_counter() - start)
            host.append(periods[-1] - (clock.waited - waited))
        steps, gaps = recorder.seconds()
    drain(engine)
    return {
        "benchmark": "gaps",
        **subject.describe(),
        "batch": num_rows,
        "steps": len(steps),
        **_summary("gap_us", gaps),
        **_summary("step_us", steps),
        **_summary("period_us", periods),
        **_summary("host_us", host),
        "gap_of_bare_replays_us": round(1e6 * statistics.median(_bare_gaps()), 1),
    }


def _summary(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return {name: round(1e6 * statistics.median(ordered), 1), f"{name}_p99": round(1e6 * p99, 1)}


def _bare_gaps() -> list[float]:
    """What the same marks show between replays of a graph that nothing stands between."""
    values = torch.zeros(2**26, device="cuda")
    replay = captured(lambda: values.add_(1))
    spans = []
    for _ in range(_NUM_BARE_REPLAYS):
        before = DeviceMark()
        replay()
        spans.append((before, DeviceMark()))
    spans[-1][1].wait()
    return [later[0].seconds_since(earlier[1]) for earlier, later in zip(spans, spans[1:], strict=False)]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    subject = load_subject(options)
    if subject.device.type != "cuda":
        raise SystemExit("there are graphs on CUDA devices only")
    engine = subject.engine(max(options.batch), prefill_budget=8192)
    # what a server does while it is idle
    while engine.prepare_more():
        pass
    for num_rows in options.batch:
        print_line(run_case(subject, engine, num_rows, options))


if __name__ == "__main__":
    main()
