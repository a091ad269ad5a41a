"""Reports taken apart: who hears of what, and who does not any more."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from app.engine.client.journal import Journal
from app.engine.client.live import LiveRequests
from app.engine.interface import EngineDied, EngineError
from app.engine.messages import Abort, Command, StepReport, Submit, pack_events
from app.engine.request import (
    EngineStats,
    Event,
    FinishReason,
    Progress,
    PromptLogprobsEvent,
    TokenEvent,
    TokenLogprobs,
)
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


def deliver(live: LiveRequests, told: StepReport) -> None:
    live.deliver(told, msgspec.msgpack.encode(told))


def end(request_id: str, sample: int = 0) -> TokenEvent:
    return TokenEvent(request_id, sample, 9, finish_reason=FinishReason.LENGTH)


def test_each_sample_hears_of_its_own_tokens() -> None:
    live = LiveRequests()
    sinks = [Sink() for _ in range(5)]
    keys = {"a": live.add(make_request("a", n=3), sinks[:3]), "b": live.add(make_request("b", n=2), sinks[3:])}
    piece = PromptLogprobsEvent("b", 1, (TokenLogprobs(-1.0),))
    rich = TokenEvent("a", 1, 7, TokenLogprobs(-2.0))
    deliver(live, report(keys, piece, TokenEvent("a", 0, 5), TokenEvent("b", 1, 6), rich, end("a", 2)))
    assert [sink.heard for sink in sinks] == [[5], [rich], [end("a", 2)], [piece], [piece, 6]]


def test_a_sample_may_have_several_tokens_and_its_end_in_one_step() -> None:
    live = LiveRequests()
    sink = Sink()
    keys = {"a": live.add(make_request("a"), [sink])}
    deliver(live, report(keys, *(TokenEvent("a", 0, token) for token in (5, 6, 7)), end("a")))
    assert sink.heard == [5, 6, 7, end("a")]


def test_a_request_is_live_until_its_last_sample_has_ended() -> None:
    live = LiveRequests()
    sinks = [Sink(), Sink()]
    keys = {"a": live.add(make_request("a", n=2), sinks)}
    deliver(live, report(keys, end("a", 1)))
    deliver(live, report(keys, TokenEvent("a", 0, 5), TokenEvent("a", 1, 6)))
    assert "a" in live
    with pytest.raises(ValueError, match="live already"):
        live.add(make_request("a"), [Sink()])
    deliver(live, report(keys, end("a", 0)))
    assert "a" not in live
    assert [sink.heard for sink in sinks] == [[5, end("a", 0)], [end("a", 1)]]


def test_whoever_was_removed_hears_nothing_of_an_earlier_request_or_a_later_one() -> None:
    live = LiveRequests()
    sinks = [Sink(), Sink()]
    keys = {"a": live.add(make_request("a", n=2), sinks)}
    live.remove("a")
    again = Sink()
    keys_again = {"a": live.add(make_request("a"), [again])}
    deliver(live, report(keys, TokenEvent("a", 0, 5), end("a", 1)))
    deliver(live, report(keys_again, TokenEvent("a", 0, 6)))
    assert [sink.heard for sink in (*sinks, again)] == [[], [], [6]]


def test_a_sink_may_remove_its_request() -> None:
    live = LiveRequests()
    sinks = [Sink(lambda: live.remove("a")), Sink()]
    keys = {"a": live.add(make_request("a", n=2), sinks), "b": live.add(make_request("b"), [Sink()])}
    deliver(live, report(keys, end("a", 0), end("a", 1), end("b")))
    assert [sink.heard for sink in sinks] == [[end("a", 0)], []]
    assert "a" not in live
    assert "b" not in live


def test_all_hear_once_that_the_process_is_gone() -> None:
    live = LiveRequests()
    sinks = [Sink() for _ in range(3)]
    keys = {"a": live.add(make_request("a", n=2), sinks[:2]), "b": live.add(make_request("b"), sinks[2:])}
    deliver(live, report(keys, end("a", 0)))
    error = EngineDied("gone")
    live.lose_all(error)
    live.lose_all(error)
    deliver(live, report(keys, TokenEvent("b", 0, 5)))
    assert [sink.heard for sink in sinks] == [[end("a", 0)], [error], [error]]
    assert "b" not in live


def test_every_sample_needs_a_sink() -> None:
    live = LiveRequests()
    with pytest.raises(ValueError, match="1 sinks for 2 samples"):
        live.add(make_request("a", n=2), [Sink()])
    assert "a" not in live


GONE = EngineDied("gone")


def commands(live: LiveRequests) -> list[Command]:
    return list(live.resume())


def test_another_process_is_told_how_far_each_request_had_come() -> None:
    live = LiveRequests()
    keys: dict[str, int] = {}
    over = {"over": live.add(make_request("over"), [Sink()])}
    deliver(live, report(over, TokenEvent("over", 0, 1)))
    for name, n in (("plain", 1), ("many", 3), ("rich", 1), ("waiting", 2)):
        keys[name] = live.add(make_request(name, n=n), [Sink() for _ in range(n)])
    deliver(live, report(keys | over, TokenEvent("plain", 0, 5), TokenEvent("many", 1, 6), end("over")))
    pieces = [PromptLogprobsEvent("rich", start, (TokenLogprobs(-1.0),) * 4) for start in (1, 5)]
    deliver(live, report(keys, *pieces, end("many", 2)))
    deliver(live, report(keys, TokenEvent("plain", 0, 7), TokenEvent("rich", 0, 8, TokenLogprobs(-2.0))))
    live.note_abort("many", 0)
    live.interrupt(GONE)
    told = commands(live)
    assert told[0] == Submit(keys["plain"], make_request("plain", progress=Progress(((5, 7),))))
    assert told[2] == Abort("many", 0)
    assert [command.key for command in told if isinstance(command, Submit)] == list(keys.values())
    assert [command.request.progress for command in told if isinstance(command, Submit)] == [
        Progress(((5, 7),)),
        Progress(((), (6,), None)),
        Progress(((8,),), 8),
        Progress(((), ())),
    ]


def test_who_goes_on_hears_of_it_under_the_same_number() -> None:
    live = LiveRequests()
    sink, later = Sink(), Sink()
    keys = {"a": live.add(make_request("a"), [sink])}
    deliver(live, report(keys, TokenEvent("a", 0, 5)))
    live.interrupt(GONE)
    keys["b"] = live.add(make_request("b"), [later])
    deliver(live, report(keys, TokenEvent("a", 0, 6), TokenEvent("b", 0, 7), end("a")))
    assert (sink.heard, later.heard) == ([5, 6, end("a")], [7])
    assert "a" not in live


def test_who_was_there_at_two_deaths_is_lost_alone() -> None:
    live = LiveRequests()
    sinks = [Sink(), Sink()]
    live.add(make_request("a"), sinks[:1])
    live.interrupt(GONE)
    keys = {"b": live.add(make_request("b"), sinks[1:])}
    deliver(live, report(keys, TokenEvent("b", 0, 5)))
    live.interrupt(GONE)
    assert [sink.heard for sink in sinks] == [[GONE], [5]]
    assert commands(live) == [Submit(keys["b"], make_request("b", progress=Progress(((5,),))))]


def test_the_journal_keeps_what_live_requests_need_and_no_more() -> None:
    journal = Journal()
    live = LiveRequests(journal)
    keys = {name: live.add(make_request(name), [Sink()]) for name in "ab"}
    deliver(live, report(keys, TokenEvent("a", 0, 5)))
    keys["c"] = live.add(make_request("c"), [Sink()])
    deliver(live, report(keys, TokenEvent("c", 0, 6)))
    live.remove("b")
    assert (journal.first, journal.end) == (0, 2)
    live.remove("a")
    assert (journal.first, journal.end) == (1, 2)
    deliver(live, report(keys, end("c")))
    assert (journal.first, journal.end) == (3, 3)
    # nobody is there whom this could be of
    deliver(live, report(keys, TokenEvent("a", 0, 5)))
    assert journal.end == 3


def test_what_the_journal_has_lost_is_lost() -> None:
    size = len(msgspec.msgpack.encode(report({"a": 0}, TokenEvent("a", 0, 5))))
    live = LiveRequests(Journal(max_bytes=3 * size))
    old, new = Sink(), Sink()
    keys = {"old": live.add(make_request("old"), [old])}
    deliver(live, report(keys, TokenEvent("old", 0, 5)))
    keys["new"] = live.add(make_request("new"), [new])
    for token in (6, 7, 8):
        deliver(live, report(keys, TokenEvent("new", 0, token)))
    live.interrupt(GONE)
    assert (old.heard, new.heard) == ([5, GONE], [6, 7, 8])
    assert commands(live) == [Submit(keys["new"], make_request("new", progress=Progress(((6, 7, 8),))))]
