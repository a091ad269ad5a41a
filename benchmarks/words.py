"""A vocabulary of words " w0", " w1" ...: every token has a text, and every text of such words is known token by token.

Servers that take and return nothing but text are then held against each other token for token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WORD = re.compile(r" w(\d+)")
# how byte-level tokenizers write a space
_SPACE = "\u0120"


def word(token: int) -> str:
    return f" w{token}"


def text_of(tokens: Iterable[int]) -> str:
    return "".join(map(word, tokens))


def tokens_of(text: str) -> list[int]:
    """The tokens of a text. Raises ValueError where it is not made of words alone."""
    tokens = [int(number) for number in _WORD.findall(text)]
    if text_of(tokens) != text:
        raise ValueError(f"not a text of words: {text[:100]!r}")
    return tokens


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """tokenizer.json and tokenizer_config.json; nothing ends a text and nothing is special."""
    split = {"type": "Split", "pattern": {"Regex": _WORD.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {word(token).replace(" ", _SPACE): token for token in range(vocab_size)}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": next(iter(vocabulary))},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text("{}", encoding="utf-8")
