"""Rules in Lark's form match what the rules themselves say, character by character."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from app.engine import gbnf
from app.engine.grammars import limits
from tests.engine.bytes_tokenizer import write_byte_tokenizer

LONGEST = 4
TEXTS = ["".join(letters) for length in range(LONGEST + 1) for letters in product("abc", repeat=length)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    path: Path = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return LLTokenizer((path / "tokenizer.json").read_text(encoding="utf-8"))


# an expression is a text of GBNF and how to derive from it: the set of short texts it matches, given those of rules
Expression = tuple[str, tuple[object, ...]]

atoms = st.sampled_from(["a", "b", "ab", "ba", "c", "abc", ""]).map(lambda text: ("text", text))
classes = st.sampled_from(["a", "ab", "bc", "abc"]).map(lambda letters: ("class", letters))
references = st.sampled_from(["loop", "x"]).map(lambda name: ("rule", name))
expressions = st.recursive(
    atoms | classes | references,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("all", tuple(parts))),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("any", tuple(parts))),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}"])).map(lambda pair: ("times", *pair)),
    ),
    max_leaves=5,
)


def write(expression: tuple[object, ...]) -> str:
    match expression:
        case ("text", text):
            return f'"{text}"'
        case ("class", letters):
            return f"[{letters}]"
        case ("rule", name):
            return str(name)
        case ("all", parts):
            return "(" + " ".join(map(write, parts)) + ")"  # type: ignore[arg-type]
        case ("any", parts):
            return "(" + " | ".join(map(write, parts)) + ")"  # type: ignore[arg-type]
        case (_, part, times):
            return f"({write(part)}){times}"  # type: ignore[arg-type]
    raise AssertionError(expression)


def texts_of(expression: tuple[object, ...], rules: dict[str, frozenset[str]]) -> frozenset[str]:
    """The texts of at most LONGEST letters, as far as they are known of the rules."""
    match expression:
        case ("text", text):
            return frozenset([str(text)])
        case ("class", letters):
            return frozenset(str(letters))
        case ("rule", name):
            return rules[str(name)]
        case ("all", parts):
            return joined([texts_of(part, rules) for part in parts])  # type: ignore[union-attr]
        case ("any", parts):
            return frozenset().union(*(texts_of(part, rules) for part in parts))  # type: ignore[union-attr]
        case (_, part, times):
            once = texts_of(part, rules)  # type: ignore[arg-type]
            least, most = {"*": (0, 5), "+": (1, 5), "?": (0, 1), "{2}": (2, 2), "{1,2}": (1, 2)}[str(times)]
            return frozenset().union(*(joined([once] * number) for number in range(least, most + 1)))
    raise AssertionError(expression)


def joined(parts: list[frozenset[str]]) -> frozenset[str]:
    texts = frozenset([""])
    for part in parts:
        texts = frozenset(text + more for text in texts for more in part if len(text + more) <= LONGEST)
    return texts


def matched_by(rules: dict[str, tuple[object, ...]]) -> frozenset[str]:
    known: dict[str, frozenset[str]] = dict.fromkeys(rules, frozenset())
    while True:
        more = {name: texts_of(expression, known) for name, expression in rules.items()}
        if more == known:
            return known["root"]
        known = more


@cache
def tokens_of(tokenizer: LLTokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.tokenize_str(text))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(expressions, min_size=6, max_size=6))
def test_rules_match_the_texts_that_can_be_derived_from_them(
    tokenizer: LLTokenizer, parts: list[tuple[object, ...]]
) -> None:
    # with a rule that refers to itself in its middle, the whole is not regular, and consists of several lexemes
    loop = ("any", (parts[0], ("all", (parts[1], ("rule", "loop"), parts[2]))))
    rules = {"root": ("all", (parts[3], ("rule", "loop"), parts[4])), "loop": loop, "x": parts[5]}
    expected = matched_by(rules)
    lark = gbnf.to_lark("\n".join(f"{name} ::= {write(expression)}" for name, expression in rules.items()))
    matcher = LLMatcher(tokenizer, lark, log_level=0, limits=limits())
    found = set()
    for text in TEXTS:
        attempt = matcher.deep_copy()
        tokens = list(tokens_of(tokenizer, text))
        if not attempt.is_error() and attempt.try_consume_tokens(tokens) == len(tokens) and attempt.is_accepting():
            found.add(text)
    if expected:
        assert found == expected, lark
    else:
        # the library may refuse at once what matches nothing within LONGEST letters
        assert found == set()


KEYWORDS = 'root ::= stmt+\nstmt ::= "if" " " ident ";" | ident " = " num ";"\nident ::= [a-z]+\nnum ::= [0-9]+'
ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? [0-9]+ ("." [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("rules", "good", "bad"),
    [
        (KEYWORDS, ["if x;", "ifx = 2;if = 1;"], ["if;", "if 1;"]),
        (ARITHMETIC, ["(a1 +2)=3\n", "1=1\n2=2\n", "1 = 1 \n\n"], ["(a1 +2=3\n", ""]),
        (JSON, ['{"a": [1, {"b": null}], "c\\n": -1.5}\n', "{}"], ["[1]", '{"a" 1}', '{"a": 01x}']),
        ('root ::= [^.]* "." "\u00e9"?', ["a b.", "\u6f22.\u00e9"], [".a"]),
        ('root ::= "\\x41\\"" "/" [/]', ['A"//'], ["A//"]),
    ],
)
def test_rules_in_use(tokenizer: LLTokenizer, rules: str, good: list[str], bad: list[str]) -> None:
    matcher = LLMatcher(tokenizer, gbnf.to_lark(rules), log_level=0, limits=limits())
    assert not matcher.is_error(), matcher.get_error()
    for text in good + bad:
        attempt, tokens = matcher.deep_copy(), tokenizer.tokenize_str(text)
        is_matched = attempt.try_consume_tokens(tokens) == len(tokens) and attempt.is_accepting()
        assert is_matched == (text in good), text


def test_what_cannot_take_too_much_stays_in_one_piece() -> None:
    assert "LEXEME_0: " in (lark := gbnf.to_lark('root ::= x+ "."\nx ::= [a-z]+ " "'))
    # the whole is regular
    assert lark.splitlines()[-1] == "start: LEXEME_0" or "rule" not in lark
    spelled = gbnf.to_lark('root ::= "(" root ")" | x "a"\nx ::= [a-z]+')
    assert "PART_1}" not in spelled
    assert "rule_1: " in spelled


@pytest.mark.parametrize(
    "text",
    [
        "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(60)) + '\nr60 ::= "b"',
        "root ::= r0\n" + "\n".join(f'r{i} ::= "(" r{i + 1} ")"' for i in range(200)) + "\nr200 ::= root",
    ],
)
def test_the_work_is_bounded_where_rules_multiply(text: str) -> None:
    assert len(gbnf.to_lark(text)) < 40 * len(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('x ::= "a"', "no rule 'root'"),
        ("root ::= y", "no rule 'y'"),
        ('r0 ::= "a"\n' + "\n".join(f"r{i} ::= r{i - 1} | root" for i in range(1, 2000)) + "\nroot ::= r1999", "large"),
    ],
)
def test_what_is_no_grammar_is_told(text: str, message: str) -> None:
    with pytest.raises(gbnf.RulesError, match=message):
        gbnf.to_lark(text)
