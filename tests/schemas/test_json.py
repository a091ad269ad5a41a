"""A body has one meaning or none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.schemas.json import BodyError, parse_object

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values, max_size=4), st.booleans())
def test_what_json_writes_is_read_back(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8")) == value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"   ", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": "\x01"}', "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid UTF-8"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [Infinity]}', "Infinity"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": -1e400}', "too large"),
        (b'{"a": ' + b"1" * 5001 + b"}", "too many digits"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b'{"b": {"a": 1, "c": 2, "a": 3}}', "'a' stands twice"),
        (b"[1]", "JSON object"),
        (b'"x"', "JSON object"),
        (b"null", "JSON object"),
        (b"5", "JSON object"),
    ],
)
def test_what_parsers_disagree_about_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(BodyError, match=message) as caught:
        parse_object(raw)
    assert len(caught.value.message) <= 150


def test_pairs_of_surrogates_and_nul_are_text() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude42 \\u0000"}') == {"a": "\U0001f642 \0"}


def test_a_duplicate_key_is_named_only_as_far_as_it_is_harmless() -> None:
    key = b"k" * 1000
    with pytest.raises(BodyError) as caught:
        parse_object(b'{"' + key + b'": 1, "' + key + b'": 2}')
    assert len(caught.value.message) < 100
