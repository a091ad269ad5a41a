"""The tokenizer: control tokens are text, pieces of characters are shown as bytes, missing files are explained."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from app.serving.tokenizer import Tokenizer, TokenizerError
from tests.serving.conftest import EOS, make_byte_fallback, train_byte_level

TEXTS = ["the quick brown fox", "日本語 🙂 naïve", "\0 \t\n", f"a{EOS}b", "   leading", "x" * 1000]


@pytest.mark.parametrize("text", TEXTS)
def test_a_byte_level_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text


def test_control_tokens_in_a_text_are_characters(byte_level: Tokenizer) -> None:
    assert byte_level.special_ids == {0}
    assert 0 not in byte_level.encode(f"a{EOS}b")
    assert 0 in Tokenizer(train_byte_level(), special_tokens_in_text=True).encode(f"a{EOS}b")


def test_special_tokens_are_skipped_or_shown(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("fox"), 0]
    assert byte_level.decode(ids) == "fox"
    assert byte_level.decode(ids, skip_special_tokens=False) == "fox" + EOS


def test_ids_without_a_token_have_no_text(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, byte_fallback):
        assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
        assert tokenizer.id_to_token_text(tokenizer.vocab_size + 5) == ""


def test_the_byte_table_decodes_as_the_library_does(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes is not None
    for token in range(byte_level.vocab_size):
        expected = byte_level.decode([token], skip_special_tokens=False)
        assert byte_level.token_bytes[token].decode("utf-8", errors="replace") == expected


def test_added_tokens_outside_the_byte_alphabet_stand_for_themselves() -> None:
    backend = train_byte_level()
    backend.add_tokens(["<|日本 x|>"])
    tokenizer = Tokenizer(backend)
    token = tokenizer.vocab_size - 1
    assert tokenizer.token_bytes is not None
    assert tokenizer.token_bytes[token].decode() == tokenizer.decode([token]) == "<|日本 x|>"


def test_one_token_as_text(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    (first, *_) = byte_level.encode("\u2603")
    assert byte_level.id_to_token_text(first) == "bytes:\\xe2"
    assert byte_level.id_to_token_text(0) == EOS
    assert [byte_level.id_to_token_text(token) for token in byte_level.encode(" the dog")] == [" the", " dog"]
    ids = byte_fallback.encode("the dog é")
    assert [byte_fallback.id_to_token_text(token) for token in ids] == [
        " the",
        " dog",
        " ",
        "bytes:\\xc3",
        "bytes:\\xa9",
    ]
    assert byte_fallback.token_bytes is None
    assert byte_fallback.id_to_token_text(1) == "<s>"


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: Tokenizer) -> None:
    thread = threading.Thread(target=byte_level.encode, args=("e\u0301" * 200_000,))
    thread.start()
    num_turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    # with the interpreter lock held throughout there would be one or two
    assert num_turns >= 10


def test_a_directory_with_one_file(tmp_path: Path, byte_level: Tokenizer) -> None:
    train_byte_level().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).encode(TEXTS[1]) == byte_level.encode(TEXTS[1])


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path: Path, byte_level: Tokenizer) -> None:
    backend = train_byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode(TEXTS[0]) == byte_level.encode(TEXTS[0])
    assert len(tokenizer.encode("a")) == 1


def test_a_directory_with_gpt2s_two_files(tmp_path: Path, byte_level: Tokenizer) -> None:
    backend = train_byte_level()
    backend.model.save(str(tmp_path))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": EOS}, "bos_token": EOS}))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode(TEXTS[1]) == byte_level.encode(TEXTS[1])
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    assert tokenizer.special_ids == {0}


def test_no_tokenizer_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="--tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_a_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"cannot be read"):
        Tokenizer.from_dir(tmp_path)


def test_a_vocabulary_with_holes_has_empty_pieces() -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "c": 5}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert Tokenizer(backend).token_bytes == (b"a", b"", b"", b"", b"", b"c")


def test_a_decoder_around_byte_fallback_is_not_taken_for_byte_level() -> None:
    assert Tokenizer(make_byte_fallback()).token_bytes is None
