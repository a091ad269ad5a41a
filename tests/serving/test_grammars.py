"""What is wrong with a grammar is told once, briefly, and not worked out twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from app.engine.request import Grammar
from app.serving import grammars
from app.serving.errors import InvalidRequest
from app.serving.grammars import GrammarChecker


def test_a_grammar_that_can_be_used_is_let_through() -> None:
    checker = GrammarChecker()
    checker.check(Grammar("json_object"))
    checker.check(Grammar("regex", "a+"))
    checker.check(Grammar("json_schema", '{"type": "object"}'))


def test_what_is_wrong_is_told_each_time_with_the_field() -> None:
    checker = GrammarChecker()
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            checker.check(Grammar("regex", "(?=a)"), "structured_outputs.regex")
        assert caught.value.status == 400
        assert caught.value.param == "structured_outputs.regex"
        assert "look-around" in caught.value.message


def test_no_more_than_a_line_of_the_input_is_echoed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        GrammarChecker().check(Grammar("grammar", "root ::= " + "x" * 5000))
    assert len(caught.value.message) < 150
    assert "/" not in caught.value.message


def test_a_grammar_is_worked_out_once_while_it_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(grammars, "check", lambda grammar: checked.append(grammar.source))
    monkeypatch.setattr(grammars, "MAX_REMEMBERED", 2)
    checker = GrammarChecker()
    for source in ("a", "b", "a", "c", "a", "b"):
        checker.check(Grammar("regex", source))
    assert checked == ["a", "b", "c", "b"]
    # the same text is another grammar where it means something else
    checker.check(Grammar("grammar", "b"))
    assert checked[-1:] == ["b"]
    assert len(checked) == 5


def test_half_of_a_character_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="half of a character"):
        GrammarChecker().check(Grammar("choice", '["\ud800"]'))


def test_threads_may_share_a_checker() -> None:
    checker = GrammarChecker()
    sources = [Grammar("regex", f"a{{{count % 7}}}") for count in range(200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(checker.check, sources))
