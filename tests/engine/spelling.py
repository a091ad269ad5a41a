"""A tokenizer of single characters, with as many tokens as the fake model has, or more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from app.engine.matchers import Compiler
from app.engine.request import Grammar
from tests.engine.fakes import VOCAB_SIZE

END = 0
# with a space that the byte-level alphabet spells as another character; the last ids of the model have no token
CHARACTERS = '{}[]",:0123456789.-truefalsn abcdiopxyz_ABC+*/()'
LETTERS = tuple(dict.fromkeys(CHARACTERS))


def write_tokenizer(directory: Path, extra: Sequence[str] = ()) -> Path:
    """Write ``tokenizer.json``: token 0 ends a text, each letter is a token, and so is each of ``extra``."""
    pieces = [*LETTERS, *extra]
    vocab = {"<end>": END} | {piece.replace(" ", "\u0120"): index for index, piece in enumerate(pieces, start=1)}
    assert extra or len(vocab) < VOCAB_SIZE
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.save(str(directory / "tokenizer.json"))
    return directory


def spell(tokens: Iterable[int]) -> str:
    """The text of tokens, without the end."""
    return "".join(LETTERS[token - 1] for token in tokens if token != END)


def tokens_of(text: str) -> list[int]:
    return [LETTERS.index(letter) + 1 for letter in text]


def make_compiler(directory: Path, vocab_size: int = VOCAB_SIZE, ends: Sequence[int] = (END,)) -> Compiler:
    return Compiler(write_tokenizer(directory), vocab_size, ends)


def regex(source: str) -> Grammar:
    return Grammar("regex", source)
