"""Calls are found in text whatever its splits, and what is no call stays text."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serving.tool_calls import MAX_CALL_CHARACTERS, Piece, ToolCall, ToolCallParser, parse_call

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> \\" {"}}\n</tool_call>'
FOUND = ("f", '{"a": "</tool_call> \\" {"}')


def joined(pieces: list[Piece]) -> list[str | tuple[str, str]]:
    """Texts that follow each other as one, calls without their ids."""
    found: list[str | tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            found.append((piece.name, piece.arguments))
        elif found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def parse(*texts: str, is_open: bool = False, is_single: bool = False) -> list[str | tuple[str, str]]:
    parser = ToolCallParser(is_open=is_open, is_single=is_single)
    pieces = [piece for text in texts for piece in parser.push(text)]
    assert "" not in pieces
    return joined([*pieces, *parser.finish()])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ["plain"]),
        ("", []),
        ("ends in space \n", ["ends in space \n"]),
        (CALL, [FOUND]),
        (f"Let me see.\n\n{CALL}\n", ["Let me see.", FOUND]),
        (f"\n{CALL}\n{CALL}", [FOUND, FOUND]),
        (f"{CALL} and then", [FOUND, "and then"]),
        # the end of the text closes a call
        ('<tool_call>{"name": "f"}', [("f", "{}")]),
        ('<tool_call>{"name": "f", "parameters": {"b": 1}}</tool_call>', [("f", '{"b": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"b\\": 1}"}</tool_call>', [("f", '{"b": 1}')]),
        # no calls
        ("a <tool_call>{oops}</tool_call> b", ["a <tool_call>{oops}</tool_call> b"]),
        ('<tool_call>{"name": ""}</tool_call>', ['<tool_call>{"name": ""}</tool_call>']),
        (
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            ['<tool_call>{"name": "f", "arguments": [1]}</tool_call>'],
        ),
        ('<tool_call>["f"]</tool_call>', ['<tool_call>["f"]</tool_call>']),
        (' <tool_call>{"name": "f', [' <tool_call>{"name": "f']),
        (f"<tool_call>{{oops}}</tool_call>{CALL}", ["<tool_call>{oops}</tool_call>", FOUND]),
        ("a < b <tool", ["a < b <tool"]),
    ],
)
def test_whole_and_letter_by_letter(text: str, expected: list[str | tuple[str, str]]) -> None:
    assert parse(text) == expected
    assert parse(*text) == expected


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool", "_call>", "</", "<", ">", " ", "\n", '"', "\\", "{", "}", "x",
    '{"name": "f"}', '{"name": "g", "arguments": {"k": "v"}}', CALL, " " * 300,
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.data(), st.booleans(), st.booleans())
def test_splits_change_nothing(text: str, data: st.DataObject, is_open: bool, is_single: bool) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    texts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*texts, is_open=is_open, is_single=is_single) == parse(text, is_open=is_open, is_single=is_single)


@given(st.lists(st.sampled_from([fragment for fragment in FRAGMENTS if "name" not in fragment]), max_size=12))
def test_text_without_calls_is_kept_as_it_is(fragments: list[str]) -> None:
    text = "".join(fragments)
    assert "".join(piece for piece in parse(*fragments) if isinstance(piece, str)) == text


def test_text_is_let_out_as_soon_as_it_is_certain() -> None:
    parser = ToolCallParser()
    assert parser.push("a") == ["a"]
    assert parser.push("b <too") == ["b"]
    assert parser.push("th") == [" <tooth"]


def test_a_forced_call_needs_no_mark() -> None:
    assert parse('{"name": "f", ', '"arguments": {}}', is_open=True) == [("f", "{}")]
    # cut by a limit of length
    assert parse('{"name": "f", "argu', is_open=True) == ['{"name": "f", "argu']


def test_after_a_single_call_nothing_is_told() -> None:
    assert parse(CALL, "more", CALL, is_single=True) == [FOUND]


def test_a_call_that_never_ends_is_given_up() -> None:
    parser = ToolCallParser()
    pieces = parser.push("<tool_call>" + "x" * (MAX_CALL_CHARACTERS + 1))
    assert [len(piece) for piece in pieces if isinstance(piece, str)] == [MAX_CALL_CHARACTERS + 12]
    assert parser.push("y") == ["y"]


def test_time_does_not_grow_with_what_is_held() -> None:
    parser = ToolCallParser()
    parser.push('<tool_call>{"')
    began = time.perf_counter()
    for _ in range(20_000):
        parser.push("<>\\\\")
    assert time.perf_counter() - began < 5


def test_depth_and_numbers() -> None:
    assert parse_call('{"name": "f", "arguments": ' + "[" * 100_000) is None
    call = parse_call('{"name": "f", "arguments": {"x": 1.50, "é": null}}')
    assert call is not None
    assert json.loads(call.arguments) == {"x": 1.5, "é": None}
    assert call.id != ToolCall("f", "{}").id
