"""Reports taken apart: who hears of what, and who does not any more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.engine.client.live import LiveRequests
from app.engine.interface import EngineDied, EngineError
from app.engine.messages import StepReport, pack_events
from app.engine.request import EngineStats, Event, FinishReason, PromptLogprobsEvent, TokenEvent, TokenLogprobs
from tests.engine.fakes import make_request


class Sink:
    """Keeps what it hears, and does something then."""

    def __init__(self, on_hearing: Callable[[], None] = lambda: None) -> None:
        self.heard: list[object] = []
        self._on_hearing = on_hearing

    def _hear(self, what: object) -> None:
        self.heard.append(what)
        self._on_hearing()

    def on_token(self, token_id: int) -> None:
        self._hear(token_id)

    def on_event(self, event: Event) -> None:
        self._hear(event)

    def on_lost(self, error: EngineError) -> None:
        self._hear(error)


def report(keys: dict[str, int], *events: Event) -> StepReport:
    return pack_events(events, keys, EngineStats())


def end(request_id: str, sample: int = 0) -> TokenEvent:
    return TokenEvent(request_id, sample, 9, finish_reason=FinishReason.LENGTH)


def test_each_sample_hears_of_its_own_tokens() -> None:
    live = LiveRequests()
    sinks = [Sink() for _ in range(5)]
    keys = {"a": live.add(make_request("a", n=3), sinks[:3]), "b": live.add(make_request("b", n=2), sinks[3:])}
    piece = PromptLogprobsEvent("b", 1, (TokenLogprobs(-1.0),))
    rich = TokenEvent("a", 1, 7, TokenLogprobs(-2.0))
    live.deliver(report(keys, piece, TokenEvent("a", 0, 5), TokenEvent("b", 1, 6), rich, end("a", 2)))
    assert [sink.heard for sink in sinks] == [[5], [rich], [end("a", 2)], [piece], [piece, 6]]


def test_a_sample_may_have_several_tokens_and_its_end_in_one_step() -> None:
    live = LiveRequests()
    sink = Sink()
    keys = {"a": live.add(make_request("a"), [sink])}
    live.deliver(report(keys, *(TokenEvent("a", 0, token) for token in (5, 6, 7)), end("a")))
    assert sink.heard == [5, 6, 7, end("a")]


def test_a_request_is_live_until_its_last_sample_has_ended() -> None:
    live = LiveRequests()
    sinks = [Sink(), Sink()]
    keys = {"a": live.add(make_request("a", n=2), sinks)}
    live.deliver(report(keys, end("a", 1)))
    live.deliver(report(keys, TokenEvent("a", 0, 5), TokenEvent("a", 1, 6)))
    assert "a" in live
    with pytest.raises(ValueError, match="live already"):
        live.add(make_request("a"), [Sink()])
    live.deliver(report(keys, end("a", 0)))
    assert "a" not in live
    assert [sink.heard for sink in sinks] == [[5, end("a", 0)], [end("a", 1)]]


def test_whoever_was_removed_hears_nothing_of_an_earlier_request_or_a_later_one() -> None:
    live = LiveRequests()
    sinks = [Sink(), Sink()]
    keys = {"a": live.add(make_request("a", n=2), sinks)}
    live.remove("a")
    again = Sink()
    keys_again = {"a": live.add(make_request("a"), [again])}
    live.deliver(report(keys, TokenEvent("a", 0, 5), end("a", 1)))
    live.deliver(report(keys_again, TokenEvent("a", 0, 6)))
    assert [sink.heard for sink in (*sinks, again)] == [[], [], [6]]


def test_a_sink_may_remove_its_request() -> None:
    live = LiveRequests()
    sinks = [Sink(lambda: live.remove("a")), Sink()]
    keys = {"a": live.add(make_request("a", n=2), sinks), "b": live.add(make_request("b"), [Sink()])}
    live.deliver(report(keys, end("a", 0), end("a", 1), end("b")))
    assert [sink.heard for sink in sinks] == [[end("a", 0)], []]
    assert "a" not in live
    assert "b" not in live


def test_all_hear_once_that_the_process_is_gone() -> None:
    live = LiveRequests()
    sinks = [Sink() for _ in range(3)]
    keys = {"a": live.add(make_request("a", n=2), sinks[:2]), "b": live.add(make_request("b"), sinks[2:])}
    live.deliver(report(keys, end("a", 0)))
    error = EngineDied("gone")
    live.lose_all(error)
    live.lose_all(error)
    live.deliver(report(keys, TokenEvent("b", 0, 5)))
    assert [sink.heard for sink in sinks] == [[end("a", 0)], [error], [error]]
    assert "b" not in live


def test_every_sample_needs_a_sink() -> None:
    live = LiveRequests()
    with pytest.raises(ValueError, match="1 sinks for 2 samples"):
        live.add(make_request("a", n=2), [Sink()])
    assert "a" not in live
