"""The loop of the engine process: commands first, never a wait while there is work, idle moments put to use."""

from __future__ import annotations

import time
from typing import Any

from app.engine.messages import Abort, Beat, Command, Report, StepReport, Stop, Submit
from app.engine.process import BEAT_SECONDS, COMPILE_CHECK_SECONDS, Desk, _serve
from app.engine.request import EngineStats, Event, FinishReason, GenerationRequest, SamplingParams, TokenEvent


class ToyEngine:
    """One token for each request, a step after it was launched, and a few things to prepare."""

    def __init__(self, num_to_prepare: int) -> None:
        self.num_to_prepare = num_to_prepare
        self.log: list[str] = []
        self.queued: list[GenerationRequest] = []
        self.in_flight: list[GenerationRequest] = []
        self.is_compiling = False
        self.admissions: list[tuple[str, float]] = []
        self.patience: set[float] = set()

    @property
    def has_work(self) -> bool:
        return bool(self.queued or self.in_flight)

    @property
    def stats(self) -> EngineStats:
        return EngineStats()

    def submit(self, request: GenerationRequest) -> None:
        self.log.append(f"submit {request.request_id}")
        self.queued.append(request)

    def abort(self, request_id: str, _sample: int | None = None) -> None:
        self.log.append(f"abort {request_id}")

    def step(self) -> list[Event]:
        self.log.append("step")
        done, self.in_flight, self.queued = self.in_flight, self.queued, []
        self.admissions += [(request.request_id, time.monotonic() + 1.0) for request in self.in_flight]
        return [TokenEvent(request.request_id, 0, 7, finish_reason=FinishReason.LENGTH) for request in done]

    def take_admissions(self) -> list[tuple[str, float]]:
        admissions, self.admissions = self.admissions, []
        return admissions

    def prepare_more(self) -> bool:
        self.log.append("prepare")
        self.num_to_prepare -= 1
        return self.num_to_prepare >= 0

    def check_integrity(self) -> None:
        pass


class ToyChannel:
    """Plays commands; how long the loop was ready to wait for them goes into the engine's log."""

    def __init__(self, engine: ToyEngine, *script: list[Command]) -> None:
        self._engine = engine
        self._script = [*script, [Stop()]]
        self.sent: list[Report] = []

    def receive(self, timeout: float) -> list[Command]:
        self._engine.log.append("wait" if timeout else "look")
        self._engine.patience.add(timeout)
        return self._script.pop(0)

    def send(self, report: Report) -> None:
        self.sent.append(report)


def serve(engine: ToyEngine, *script: list[Command]) -> list[Report]:
    channel: Any = ToyChannel(engine, *script)
    _serve(channel, Desk(engine))
    sent: list[Report] = channel.sent
    return sent


def submit(name: str, key: int) -> Submit:
    return Submit(key, GenerationRequest(name, (1, 2), SamplingParams(), 1))


def test_idle_moments_prepare_until_nothing_is_left_and_then_it_waits() -> None:
    engine = ToyEngine(num_to_prepare=2)
    sent = serve(engine, [], [], [], [])
    assert engine.log == ["look", "prepare", "look", "prepare", "look", "prepare", "wait", "prepare", "wait"]
    assert [type(report) for report in sent] == [Beat] * 4


def test_a_request_comes_before_what_is_left_to_prepare_and_its_steps_follow_without_a_wait() -> None:
    engine = ToyEngine(num_to_prepare=5)
    sent = serve(engine, [], [submit("a", 1)], [submit("b", 2), Abort("x", None)], [], [])
    assert engine.log[:2] == ["look", "prepare"]
    assert engine.log[2:] == [
        *("look", "submit a", "step"),
        *("look", "submit b", "abort x", "step"),
        *("look", "step"),
        *("look", "prepare"),
        "look",
    ]
    reports = [report for report in sent if isinstance(report, StepReport)]
    assert [[rich.key for rich in report.rich] for report in reports] == [[], [1], [2]]
    assert [[round(seconds) for seconds in report.waits] for report in reports] == [[1], [1], []]


def test_without_work_it_waits_until_the_next_beat_and_for_a_grammar_not_that_long() -> None:
    engine = ToyEngine(0)
    serve(engine, [], [], [])
    assert engine.patience == {0, BEAT_SECONDS}
    engine = ToyEngine(0)
    engine.is_compiling = True
    serve(engine, [], [], [])
    assert engine.patience == {0, COMPILE_CHECK_SECONDS}
