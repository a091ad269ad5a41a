"""Grammars in the library's words: what they match, what is refused, and that no source costs much."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from app.engine.grammars import MAX_SOURCE_BYTES, GrammarError, limits, to_lark
from app.engine.matchers import Compiler, MatchError
from app.engine.request import Grammar
from tests.engine.bytes_tokenizer import END, VOCAB_SIZE, write_byte_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> LLTokenizer:
    return LLTokenizer((directory / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiler(directory: Path) -> Compiler:
    return Compiler(directory, VOCAB_SIZE, [END])


def matches(tokenizer: LLTokenizer, grammar: Grammar, text: str) -> bool:
    matcher = LLMatcher(tokenizer, to_lark(grammar), log_level=0, limits=limits())
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


LARK = 'start: "a" NUMBER+\nNUMBER: /[0-9]/ ";"'


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json_object"), ['{"a": [1, {"b": null}]}', "{}", '{\n  "a": "x"\n}'], ["[1]", "1", '{"a"}', ""]),
        (Grammar("regex", "a+|b{2,3}"), ["a", "aaaa", "bb"], ["b", "ab", "bbbb", "xa"]),
        (Grammar("regex", "[0-9]{3}-[0-9]{4}"), ["555-1234"], ["5551234"]),
        (Grammar("regex", "a/b"), ["a/b"], ["ab"]),
        (Grammar("regex", r"\d[\w.]\S\\d"), ["1_!\\d", "9.x\\d"], ["\u0661_!\\d", "1\u00e9!\\d", "1_ \\d", "1_!1"]),
        (Grammar("regex", r"[^\d\s]\D\W"), ["ab!", "\u00e9\u00e9\u00e9"], ["1b!", " b!", "a1!", "abc"]),
        (Grammar("choice", '["yes", "no", "yes, but"]'), ["yes", "no", "yes, but"], ["ye", "yesno", "yes,"]),
        (Grammar("grammar", '?start: x\n?x: "a" -> one | "b" x'), ["a", "bba"], ["b", "ab"]),
        (Grammar("grammar", 'root ::= start "b"\nstart ::= "a"'), ["ab"], ["a"]),
        (Grammar("grammar", 'root ::= "a"\n   | "b" # or so\n\n  | x{2}\nx ::= "c"'), ["a", "b", "cc"], ["c", "ab"]),
        (Grammar("grammar", 'root ::= "\\u00e9" [\\u4e00-\\u9fff] [^\\]\\-a]'), ["\u00e9\u6f22z"], ["\u00e9\u6f22-"]),
        (Grammar("grammar", LARK), ["a1;", "a1;2;"], ["a", "a1"]),
        (schema({"type": "integer", "minimum": 3, "maximum": 12}), ["3", "12", "7"], ["2", "13", "1.5", '"3"']),
        (schema({"enum": ["x", 1, None]}), ['"x"', "1", "null"], ["x", "2"]),
        (schema({"type": "string", "pattern": "^[ab]+$", "maxLength": 3}), ['"aba"'], ['"abab"', '"c"']),
        (
            schema({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}),
            ["[]", "[[],[[]]]"],
            ["[1]"],
        ),
    ],
)
def test_a_grammar_matches_what_it_says(
    tokenizer: LLTokenizer, grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not matches(tokenizer, grammar, text)] == []
    assert [text for text in bad if matches(tokenizer, grammar, text)] == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=4))
def test_any_text_can_be_a_choice(tokenizer: LLTokenizer, choices: list[str]) -> None:
    grammar = Grammar("choice", json.dumps(choices))
    for choice in choices:
        assert matches(tokenizer, grammar, choice)
    longer = choices[0] + "#"
    assert matches(tokenizer, grammar, longer) == (longer in choices)


def test_white_space_has_an_end(tokenizer: LLTokenizer) -> None:
    for grammar in (Grammar("json_object"), schema({"type": "object"})):
        assert matches(tokenizer, grammar, '{"a":' + " " * 32 + "1}")
        assert not matches(tokenizer, grammar, '{"a":' + " " * 33 + "1}")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (schema({"type": "foo"}), "the JSON schema cannot be used: Invalid type: foo"),
        (schema({"not": {}}), 'the JSON schema cannot be used: Unimplemented keys: ["not"]'),
        (schema({"$ref": "#/$defs/x"}), "Pointer '/$defs/x' does not exist"),
        (schema({"$ref": "http://example.com/x"}), "http://example.com/x"),
        (schema({"type": "integer", "minimum": 3, "maximum": 1}), "minimum (3) is greater than maximum (1)"),
        (schema({"$ref": "#"}), "no text matches it"),
        (schema([]), "the JSON schema cannot be used"),
        (Grammar("json_schema", "{"), "the JSON schema cannot be used: EOF while parsing"),
        (Grammar("json_schema", ""), "the JSON schema cannot be used"),
        (Grammar("regex", "(?=x)a"), "the regular expression cannot be used: look-around"),
        (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
        (Grammar("regex", "[a"), "the regular expression cannot be used: unclosed character class"),
        (Grammar("regex", "a\\"), "ends in a backslash"),
        (Grammar("regex", "\ud800"), "half of a character"),
        (Grammar("choice", "[]"), "the list of choices is empty"),
        (Grammar("choice", '["a", 1]'), "not a JSON list of strings"),
        (Grammar("choice", json.dumps(["a"] * 5_001)), "more than 5000"),
        (Grammar("grammar", ""), "the grammar cannot be used: there is no rule 'root'"),
        (Grammar("grammar", 'x ::= "a"'), "there is no rule 'root'"),
        (Grammar("grammar", "root ::= a"), "there is no rule 'a'"),
        (Grammar("grammar", 'root ::= "a'), "Unexpected end of input"),
        (Grammar("grammar", 'root ::= "\\'), "unexpected end"),
        (Grammar("grammar", "start: missing"), "the grammar cannot be used"),
    ],
)
def test_what_is_wrong_is_told_in_one_short_line(compiler: Compiler, grammar: Grammar, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(grammar)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 150


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(" * 20_000 + "a" + ")" * 20_000),
        Grammar("regex", "x" * (MAX_SOURCE_BYTES + 1)),
        Grammar("choice", "[" * 100_000),
        Grammar("grammar", "root ::= " + "(" * 5_000),
        Grammar("grammar", "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000),
        Grammar("grammar", "start: " + "(" * 5_000 + '"a"' + ")" * 5_000),
        Grammar("json_schema", '{"a":' * 10_000 + "1" + "}" * 10_000),
        schema({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in "ab"]} for i in range(20)]}),
    ],
    ids=lambda grammar: f"{grammar.kind} {grammar.source[:20]}",
)
def test_what_would_cost_too_much_is_refused_soon(compiler: Compiler, grammar: Grammar) -> None:
    begun = time.process_time()
    with pytest.raises(GrammarError):
        compiler.compile(grammar)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(a+)+$"),
        Grammar("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}"),
        Grammar("regex", "(.*a.{500}b.*){10}"),
        Grammar("grammar", 'root ::= "a"{1,100000}'),
        Grammar("grammar", "start: e\ne: e e | e e e | /a*/"),
        schema({"type": "string", "pattern": "^(x+x+)+y$"}),
        schema({"type": "string", "minLength": 100_000}),
        schema({"type": "array", "items": {"type": "integer"}, "minItems": 100_000}),
        schema({"patternProperties": {"^(a|b)*c": {"type": "integer"}}}),
    ],
    ids=lambda grammar: f"{grammar.kind} {grammar.source[:20]}",
)
def test_what_explodes_elsewhere_costs_little(compiler: Compiler, grammar: Grammar) -> None:
    begun = time.process_time()
    matcher = compiler.compile(grammar)
    for _ in range(20):
        try:
            allowed = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))
        except MatchError:
            # one of the limits, which ends one sample
            break
        if allowed.tolist() in ([], [END]):
            break
        matcher.accept(int(allowed[-1]))
    assert time.process_time() - begun < 2
