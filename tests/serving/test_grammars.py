"""What is wrong with a grammar is told briefly and worked out once, and none does harm."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.engine.request import Grammar
from app.serving import grammar_worker, grammars
from app.serving.errors import InvalidRequest, ServerFailure
from app.serving.grammars import TOO_COMPLEX, GrammarChecker


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker()
    yield made
    made.close()


def test_a_grammar_that_can_be_used_is_let_through(checker: GrammarChecker) -> None:
    checker.check(Grammar("json_object"))
    checker.check(Grammar("regex", "a+"))
    checker.check(Grammar("json_schema", '{"type": "object"}'))


def test_what_is_wrong_is_told_each_time_with_the_field(checker: GrammarChecker) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            checker.check(Grammar("regex", "(?=a)"), "structured_outputs.regex")
        assert caught.value.status == 400
        assert caught.value.param == "structured_outputs.regex"
        assert "look-around" in caught.value.message


def test_no_more_than_a_line_of_the_input_is_echoed(checker: GrammarChecker) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checker.check(Grammar("grammar", "root ::= " + "x" * 5000))
    assert len(caught.value.message) < 150
    assert "/" not in caught.value.message


def test_a_grammar_is_worked_out_once_while_it_is_remembered(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(checker, "_try_out", lambda grammar: tried.append(grammar.source))
    monkeypatch.setattr(grammars, "MAX_REMEMBERED", 2)
    for source in ("a", "b", "a", "c", "a", "b"):
        assert checker.is_known(Grammar("regex", source)) == (source in tried and (source != "b" or "c" not in tried))
        checker.check(Grammar("regex", source))
    assert tried == ["a", "b", "c", "b"]
    # the same text is another grammar where it means something else
    checker.check(Grammar("grammar", "b"))
    assert len(tried) == 5


def test_half_of_a_character_is_refused(checker: GrammarChecker) -> None:
    with pytest.raises(InvalidRequest, match="half of a character"):
        checker.check(Grammar("choice", '["\ud800"]'))


def test_threads_may_share_a_checker(checker: GrammarChecker) -> None:
    sources = [Grammar("regex", f"a{{{count % 7}}}") for count in range(200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(checker.check, sources))


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"allOf": [{"type": "string", "pattern": f"^.*{i}.*$"} for i in range(200)]}),
        Grammar("regex", "a?" * 30_000),
        Grammar("grammar", "start: T0\n" + "\n".join(f'T{i}: T{i + 1} "a"' for i in range(3500)) + '\nT3500: "b"'),
    ],
    ids=["endless", "memory", "stack"],
)
def test_a_grammar_that_takes_everything_is_refused_and_the_next_is_served(
    checker: GrammarChecker, grammar: Grammar
) -> None:
    assert grammar_worker.CPU_SECONDS < 3
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="too complex|too big|cannot be used"):
            checker.check(grammar)
    assert time.monotonic() - begun < 20
    checker.check(Grammar("regex", "a+"))


def test_a_process_that_is_gone_says_nothing_against_the_next_grammar(checker: GrammarChecker) -> None:
    checker.check(Grammar("regex", "a"))
    assert checker._worker is not None
    first = checker._worker._process
    checker.close()
    assert first.returncode is not None
    checker.check(Grammar("regex", "b"))


def test_a_process_that_does_not_start_is_no_fault_of_the_grammar(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(grammars.sys, "executable", "/bin/false")
        with pytest.raises(ServerFailure):
            checker.check(Grammar("regex", "a"))
    assert "does not start" in caplog.text
    checker.check(Grammar("regex", "a"))


# --- inside the process


def test_masks_that_take_long_are_refused() -> None:
    tokenizer = grammar_worker.make_tokenizer()
    now = iter(range(100))
    grammar = Grammar("regex", "[ab]{20}")
    assert grammar_worker.try_out(grammar, tokenizer) is None
    complaint = grammar_worker.try_out(grammar, tokenizer, clock=lambda: float(next(now)))
    assert complaint == "the regular expression cannot be used: it takes too long to tell which tokens may follow"


def test_a_grammar_without_any_text_is_refused() -> None:
    complaint = grammar_worker.try_out(Grammar("grammar", "root ::= root"), grammar_worker.make_tokenizer())
    assert complaint == "the grammar cannot be used: no text matches it"


@pytest.mark.parametrize("source", ['root ::= "a" root', 'root ::= "b" | "b" [0-9] rest\nrest ::= "ab" rest'])
def test_a_grammar_that_demands_a_text_without_end_is_refused(source: str) -> None:
    complaint = grammar_worker.try_out(Grammar("grammar", source), grammar_worker.make_tokenizer())
    assert complaint == "the grammar cannot be used: the text that it demands has no end, or is too long"


def test_a_long_text_that_is_demanded_is_let_through() -> None:
    tokenizer = grammar_worker.make_tokenizer()
    assert grammar_worker.try_out(Grammar("choice", json.dumps(["ab c" * 15_000])), tokenizer) is None
    assert grammar_worker.try_out(Grammar("grammar", 'root ::= "a"{30000} "b"'), tokenizer) is None


def test_too_complex_is_one_line() -> None:
    assert "\n" not in TOO_COMPLEX
