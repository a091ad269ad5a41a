"""What goes through the socket comes out as it was, and ordinary tokens stay small."""

from __future__ import annotations

import math

import msgspec
import pytest

from app.engine.config import EngineConfig
from app.engine.messages import (
    Abort,
    Arguments,
    Beat,
    Checked,
    Command,
    Ready,
    Report,
    StartFailed,
    Stop,
    Submit,
    pack_events,
    unpack_rich,
)
from app.engine.request import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    PromptLogprobsEvent,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from tests.fakes import make_info

STATS = EngineStats(*range(9))
RECORD = TokenLogprobs(-0.25, ((3, -0.25), (4, -math.inf)))


def through_wire(message: object, kind: object) -> object:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind)


def test_commands_survive_the_wire() -> None:
    sampling = SamplingParams(0.5, 3, 0.9, 0.1, 1.0, -1.0, 1.1, ((5, -2.0),), -(2**63), 4)
    request = GenerationRequest("id", (1, 2, 3), sampling, 10, (0, 7), 3, 5)
    commands = [Submit(1, request), Abort("id", None), Abort("id", 2), Stop()]
    assert through_wire(commands, list[Command]) == commands


@pytest.mark.parametrize(
    "report", [Beat(), Beat(STATS), Checked("/dir"), StartFailed("no"), Ready(make_info(50), STATS)], ids=repr
)
def test_reports_survive_the_wire(report: Report) -> None:
    assert through_wire(report, Report) == report


def test_events_survive_the_wire() -> None:
    events = [
        PromptLogprobsEvent("a", 1, (RECORD, TokenLogprobs(-3.0))),
        TokenEvent("a", 0, 17),
        TokenEvent("b", 5, 18),
        TokenEvent("b", 1, 18, RECORD),
        TokenEvent("b", 0, 19, finish_reason=FinishReason.STOP, stop_reason=19),
        TokenEvent("c", 0, None, finish_reason=FinishReason.ERROR, error="why"),
    ]
    report = through_wire(pack_events(events, {"a": 1, "b": 2, "c": 3}, STATS), Report)
    (piece,) = report.prompt_slices  # type: ignore[attr-defined]
    assert PromptLogprobsEvent("a", piece.start, piece.logprobs) == events[0]
    assert (report.samples, report.tokens) == ([1, 7], [17, 18])  # type: ignore[attr-defined]
    names = {1: "a", 2: "b", 3: "c"}
    assert [unpack_rich(names[rich.key], rich) for rich in report.rich] == events[3:]  # type: ignore[attr-defined]
    assert report.stats == STATS  # type: ignore[attr-defined]


def test_an_ordinary_token_takes_few_bytes() -> None:
    events = [TokenEvent(f"request-{i}", 0, 50_000 + i) for i in range(256)]
    keys = {f"request-{i}": 10_000 + i for i in range(256)}
    assert len(msgspec.msgpack.encode(pack_events(events, keys, STATS))) < 256 * 6 + 400


def test_arguments_survive_the_command_line() -> None:
    arguments = Arguments("ipc:///tmp/x", 7, EngineConfig("model with spaces", max_num_seqs=3, memory_fraction=0.25))
    assert Arguments.from_json(arguments.to_json()) == arguments
