"""Text to token ids and back, over the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

REPLACEMENT = "\ufffd"
_WHOLE = "tokenizer.json"


class TokenizerError(Exception):
    """No tokenizer can be made of what the directory holds; the message is for the operator."""


class Tokenizer:
    """A tokenizer whose reading of a text does not change while it serves.

    special_tokens: control tokens by id, each with its text and with the white space that it takes.
    token_bytes: each token's bytes where decoding is nothing but joining them (byte-level BPE), else None.
    token_texts: beside ``token_bytes``, the text of each token that holds whole characters, else None.
    byte_of: the byte of each token that stands for one, where a vocabulary spells rare characters in bytes.
    has_file: whether it comes from one file, which the engine can read as well: grammars need it.

    Control tokens that stand in a text as text, such as an end-of-text marker, are ordinary characters unless
    ``special_tokens_in_text`` is set: what a client writes can not end a document or open a role. Safe to use from
    several threads.
    """

    def __init__(self, backend: Backend, *, special_tokens_in_text: bool = False, has_file: bool = True) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not special_tokens_in_text
        self._backend = backend
        self.has_file = has_file
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {index: token for index, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_tokens)
        self._literal_ids = frozenset(added)
        self._added_ids = {token.content: index for index, token in added.items()}
        self.token_bytes = _byte_table(backend)
        self.token_texts = tuple(map(_whole_text, self.token_bytes or ()))
        self.byte_of = _fallback_bytes(backend)
        self._text_of = lru_cache(maxsize=2**16)(self._make_token_text)

    @classmethod
    def from_dir(cls, path: str | Path, *, special_tokens_in_text: bool = False) -> Tokenizer:
        """The tokenizer of a model directory: ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``.

        Raises TokenizerError when there is none, or none that can be read.
        """
        has_file = (Path(path) / _WHOLE).is_file()
        return cls(_load(Path(path)), special_tokens_in_text=special_tokens_in_text, has_file=has_file)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ``add_special_tokens`` lets the tokenizer frame it as its model was trained."""
        # only the calls for batches let go of the interpreter lock, without which threads do not help
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, none of which is framed."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the tokenizer does not know have none."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def find_added(self, text: str) -> int | None:
        """The id of a token that stands beside the vocabulary proper, such as a marker; None if there is none."""
        return self._added_ids.get(text)

    def id_to_token_text(self, token_id: int) -> str:
        """One token as log-probabilities show it: its text, or ``bytes:\\xe2\\x82`` for a part of a character."""
        return self._text_of(token_id)

    def id_to_bytes(self, token_id: int) -> bytes:
        """One token's text in UTF-8, or its part of a character; nothing for ids that the tokenizer does not know."""
        if self.token_bytes is not None:
            return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""
        if token_id in self.byte_of:
            return bytes([self.byte_of[token_id]])
        return self.id_to_token_text(token_id).encode("utf-8", "replace")

    def _make_token_text(self, token_id: int) -> str:
        if self.token_bytes is not None:
            return _show_bytes(self.token_bytes[token_id]) if token_id < len(self.token_bytes) else ""
        piece = self._backend.id_to_token(token_id)
        if piece is None or token_id in self._literal_ids:
            return piece or ""
        if token_id in self.byte_of:
            return _show_bytes(bytes([self.byte_of[token_id]]))
        # decoders drop a space at the start of a text, so the token is read behind itself
        alone = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _show_bytes(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _load(path: Path) -> Backend:
    whole, vocabulary, merges = path / _WHOLE, path / "vocab.json", path / "merges.txt"
    try:
        if whole.is_file():
            return Backend.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            return _byte_level(vocabulary, merges, path / "special_tokens_map.json")
    except Exception as error:
        # the library raises bare Exception for whatever is wrong with a file
        raise TokenizerError(f"the tokenizer in {path} cannot be read: {error}") from error
    raise TokenizerError(
        f"{path} holds no tokenizer.json (and no vocab.json with merges.txt); "
        "name a directory or hub id that does with --tokenizer"
    )


def _byte_level(vocabulary: Path, merges: Path, special_map: Path) -> Backend:
    """GPT-2's two files, for checkpoints from before ``tokenizer.json``."""
    backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if special_map.is_file():
        backend.add_special_tokens(_special_texts(json.loads(special_map.read_text(encoding="utf-8"))))
    return backend


def _special_texts(special_map: dict[str, Any]) -> list[str]:
    values = [item for value in special_map.values() for item in (value if isinstance(value, list) else [value])]
    return sorted({value["content"] if isinstance(value, dict) else value for value in values})


def _byte_table(backend: Backend) -> tuple[bytes, ...] | None:
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    byte_of = _byte_alphabet()
    pieces = {index: piece for piece, index in backend.get_vocab(with_added_tokens=True).items()}
    return tuple(_piece_bytes(pieces.get(index, ""), byte_of) for index in range(max(pieces) + 1))


def _fallback_bytes(backend: Backend) -> dict[int, int]:
    if backend.decoder is None or b"ByteFallback" not in backend.decoder.__getstate__():
        return {}
    ids = ((backend.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {index: byte for index, byte in ids if index is not None}


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters stand for themselves; the other bytes take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _piece_bytes(piece: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of[character] for character in piece])
    except KeyError:
        # an added token with characters outside the alphabet stands for itself
        return piece.encode("utf-8")
