"""The tokenizer is exact on any text and cuts where a prompt may end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from models.recipe.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, SPECIAL_TOKENS, load_tokenizer
from tests.models.conftest import TinyRun


@pytest.fixture(scope="module")
def tokenizer(tiny_run: TinyRun):  # type: ignore[no-untyped-def]
    return load_tokenizer(tiny_run.tokenizer)


def test_special_tokens_have_the_first_ids(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.get_vocab_size() == 512


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode(text, add_special_tokens=False).ids

    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_spellings_in_a_document_are_ordinary_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode(f"x = '{END_OF_TEXT}'").ids

    assert END_OF_TEXT_ID not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"x = '{END_OF_TEXT}'"


def test_line_ends_and_indentation_are_tokens_of_their_own(tokenizer) -> None:  # type: ignore[no-untyped-def]
    tokens = tokenizer.encode("if a:\n        return\n\n    b = [12").tokens

    assert "ĠĠĠĠĠĠĠĠ" in tokens
    assert tokens.count("Ċ") == 3
    assert all(token == "Ċ" or "Ċ" not in token for token in tokens)
    assert tokens[-2:] == ["1", "2"]


def test_auto_tokenizer_loads_the_files(tiny_run: TinyRun) -> None:
    loaded = AutoTokenizer.from_pretrained(tiny_run.tokenizer.parent)
    text = "def f(x):\n    return x . y\n"

    assert loaded.eos_token_id == loaded.pad_token_id == loaded.bos_token_id == END_OF_TEXT_ID
    assert loaded("<|fim_prefix|>a")["input_ids"][0] == SPECIAL_TOKENS.index("<|fim_prefix|>")
    assert loaded.decode(loaded(text)["input_ids"]) == text
