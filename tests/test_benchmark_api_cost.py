"""The cost of the API process is measured on a real server over an engine that only beats time."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine.request import FinishReason, GenerationRequest, SamplingParams
from benchmarks import api_cost
from benchmarks.metronome import Metronome
from tests.api.conftest import byte_tokenizer_json


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer_json())
    return str(tmp_path)


def test_every_row_gets_a_token_with_every_beat() -> None:
    engine = Metronome(0.0, 4, 50)
    for name, n, max_tokens in (("a", 2, 3), ("b", 1, 2)):
        engine.submit(GenerationRequest(name, (1,), SamplingParams(), max_tokens, n=n))
    steps = []
    while engine.has_work:
        steps.append(engine.step())
    assert [len(events) for events in steps] == [3, 3, 2]
    events = [event for step in steps for event in step]
    assert all(0 < event.token_id < 50 for event in events)
    ends = [(event.request_id, event.sample) for event in events if event.finish_reason is FinishReason.LENGTH]
    assert ends == [("b", 0), ("a", 0), ("a", 1)]


def test_an_aborted_row_ends_with_the_next_beat() -> None:
    engine = Metronome(0.0, 4, 50)
    engine.submit(GenerationRequest("a", (1,), SamplingParams(), 100, n=2))
    engine.abort("a", 1)
    assert [event.finish_reason for event in engine.step()] == [None, FinishReason.ABORT]
    engine.abort("a")
    assert [event.finish_reason for event in engine.step()] == [FinishReason.ABORT]
    assert not engine.has_work


def test_tokens_are_paced_and_counted(tokenizer: str) -> None:
    # enough of them to take several ticks of the system's clock, which is what the time is counted in
    line = api_cost.measure_tokens(api_cost.Case("test", 40, 0.01, 100), tokenizer)
    assert 5 <= line["gap_ms_p50"] < 100
    # bytes that are no character leave with those that complete it
    assert 1 <= line["tokens_per_event"] < 10
    assert line["us_per_token"] > 0


def test_requests_are_counted(tokenizer: str) -> None:
    line = api_cost.measure_requests(4, 25, tokenizer)
    assert line["us_per_request"] > 0
    assert line["first_token_ms_p50"] <= line["first_token_ms_worst"]
