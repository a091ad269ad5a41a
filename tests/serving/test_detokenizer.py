"""Any split of any text into tokens re-joins, and no half of a character is shown."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serving.detokenizer import Detokenizer, make_detokenizer
from app.serving.tokenizer import REPLACEMENT, Tokenizer
from tests.serving.conftest import make_byte_fallback, train_byte_level

TOKENIZERS = {"byte_level": Tokenizer(train_byte_level()), "byte_fallback": Tokenizer(make_byte_fallback())}
BYTE_IDS = {
    "byte_level": {
        piece[0]: i for i, piece in enumerate(TOKENIZERS["byte_level"].token_bytes or ()) if len(piece) == 1
    },
    "byte_fallback": {byte: 3 + byte for byte in range(256)},
}
kinds = st.sampled_from(sorted(TOKENIZERS))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def without_beginning(data: bytes) -> str:
    """The text of bytes, without the beginning of a character at their end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(kinds, texts)
def test_tokens_of_a_text_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    pieces = run(make_detokenizer(tokenizer, (), skip_special_tokens=True), ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces)


@given(kinds, texts)
def test_single_bytes_join_and_no_half_character_is_shown(kind: str, text: str) -> None:
    ids = [BYTE_IDS[kind][byte] for byte in text.encode()]
    pieces = run(make_detokenizer(TOKENIZERS[kind], (), skip_special_tokens=True), ids)
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@given(kinds, texts, st.data())
def test_a_continuation_joins_its_prompt(kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("the dog " + text)
    border = data.draw(st.integers(1, len(ids)))
    before, after = ids[:border], ids[border:]
    head = make_detokenizer(tokenizer, (), skip_special_tokens=True)
    shown = "".join(head.push(token) for token in before)
    tail = make_detokenizer(tokenizer, before, skip_special_tokens=True)
    assert shown + "".join(run(tail, after)) == "the dog " + text


@given(st.lists(st.integers(0, 379), max_size=40))
def test_arbitrary_tokens_read_as_the_library_reads_them(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    for skip in (True, False):
        pieces = run(make_detokenizer(tokenizer, (), skip_special_tokens=skip), ids)
        assert tokenizer.token_bytes is not None
        shown = [token for token in ids if not (skip and token in tokenizer.special_ids)]
        assert "".join(pieces) == without_beginning(b"".join(tokenizer.token_bytes[token] for token in shown))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)[: len("".join(pieces))]


@given(st.lists(st.integers(0, 293) | st.integers(3 + 0xC0, 3 + 0xFF) | st.integers(3 + 0x80, 3 + 0xBF), max_size=60))
def test_arbitrary_bytes_and_words_join_as_utf8(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    seen = [token for token in ids if token not in tokenizer.special_ids]
    data = [bytes([token - 3]) if 3 <= token < 259 else tokenizer.id_to_token_text(token).encode() for token in seen]
    expected = without_beginning(b"".join(data))
    # the decoder drops the space before the first word
    if data and seen[0] >= 259:
        expected = expected.removeprefix(" ")
    assert "".join(run(make_detokenizer(tokenizer, (), skip_special_tokens=True), ids)) == expected


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_an_incomplete_end_is_left_out(kind: str) -> None:
    ids = [BYTE_IDS[kind][byte] for byte in "🙂".encode()[:3]]
    detokenizer = make_detokenizer(TOKENIZERS[kind], (), skip_special_tokens=True)
    assert [detokenizer.push(token) for token in ids] == ["", "", ""]
    assert detokenizer.flush() == ""
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_special_tokens_are_skipped_or_shown(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    special = max(tokenizer.special_ids)
    ids = [*tokenizer.encode("a"), special, *tokenizer.encode("b")]
    name = tokenizer.id_to_token_text(special)
    hidden = "".join(run(make_detokenizer(tokenizer, (), skip_special_tokens=True), ids))
    shown = "".join(run(make_detokenizer(tokenizer, (), skip_special_tokens=False), ids))
    assert name not in hidden
    assert name in shown


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("junk", ["broken", "unknown", "none"])
def test_no_token_is_looked_at_for_long(kind: str, junk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[kind]
    lengths = [0]

    def decode(self: Tokenizer, ids: list[int], **options: bool) -> str:
        lengths.append(len(ids))
        return original(self, ids, **options)

    original = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", decode)
    tokens = {"broken": BYTE_IDS[kind][0x80], "unknown": tokenizer.vocab_size + 1, "none": BYTE_IDS[kind][0x61]}
    detokenizer = make_detokenizer(tokenizer, (), skip_special_tokens=True)
    shown = "".join(detokenizer.push(tokens[junk]) for _ in range(1000)) + detokenizer.flush()
    assert max(lengths) <= 32
    assert shown == {"broken": REPLACEMENT * 1000, "unknown": "", "none": "a" * 1000}[junk]
