"""Token by token to text that never has to be taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from app.serving.tokenizer import REPLACEMENT, Tokenizer

# a character of UTF-8 has at most four bytes, so this many tokens without one will not become any
MAX_WAITING_TOKENS = 16
# tokens of the prompt that are enough to know how the next one joins them
NUM_CONTEXT_TOKENS = 6


class Detokenizer(Protocol):
    """The text of one growing sequence. All pieces joined are the text, whatever the tokens' borders; a character
    that was begun at its end and never completed is left out.
    """

    def push(self, token_id: int) -> str:
        """The text that is certain with this token and was not before; empty inside a character."""

    def flush(self) -> str:
        """The end of the sequence: text that waited for more, without the beginning of a character."""


def make_detokenizer(tokenizer: Tokenizer, context: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
    """A detokenizer that goes on after the tokens of ``context``, whose own text it does not repeat."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
    tail = [token for token in context[-NUM_CONTEXT_TOKENS:] if token not in skipped]
    if tokenizer.token_bytes is not None:
        return _ByteDetokenizer(tokenizer, tail, skipped)
    return _WindowDetokenizer(tokenizer, tail, skipped)


class _ByteDetokenizer:
    """Byte-level vocabularies: bytes are joined and decoded as they come, at constant cost per token."""

    __slots__ = ("_rest", "_skipped", "_texts", "_token_bytes")

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skipped: frozenset[int]) -> None:
        self._token_bytes = tokenizer.token_bytes or ()
        self._texts = tokenizer.token_texts
        self._skipped = skipped
        # the beginning of a character
        self._rest = b""
        for token in context:
            self.push(token)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or token_id >= len(self._texts):
            return ""
        if not self._rest:
            text = self._texts[token_id]
            if text is not None:
                return text
        data = self._rest + self._token_bytes[token_id]
        text, num_decoded = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[num_decoded:]
        return text

    def flush(self) -> str:
        self._rest = b""
        return ""


class _WindowDetokenizer:
    """Any other vocabulary: the last tokens are decoded again together with each new one.

    The window holds the tokens of the piece given last and those that wait after it, so that the cost of a token
    does not grow with the sequence, and decoders that look at their neighbours, for spaces, see them. Tokens that
    stand for single bytes are joined here: the library would turn a whole run of them into U+FFFD for one wrong byte.
    """

    __slots__ = ("_byte_tokens", "_decoder", "_given", "_num_waiting", "_skipped", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._byte_tokens: list[int] = []
        self._window: list[int] = []
        self._num_waiting = 0
        self._given = ""
        for token in context:
            self.push(token)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        byte = self._tokenizer.byte_of.get(token_id)
        if byte is not None:
            return self._push_byte(token_id, byte)
        unfinished = self._end_bytes()
        self._window.append(token_id)
        self._num_waiting += 1
        text = self._decode()
        if text.endswith(REPLACEMENT) and self._num_waiting < MAX_WAITING_TOKENS:
            return unfinished
        return unfinished + self._give(text)

    def flush(self) -> str:
        # bytes that wait are the beginning of a character
        self._decoder.reset()
        return self._give_waiting().removesuffix(REPLACEMENT)

    def _push_byte(self, token_id: int, byte: int) -> str:
        waiting = self._give_waiting()
        self._byte_tokens.append(token_id)
        piece = self._decoder.decode(bytes((byte,)))
        if piece:
            self._start_window()
        return waiting + piece

    def _end_bytes(self) -> str:
        piece = self._decoder.decode(b"", final=True)
        if self._byte_tokens:
            self._start_window()
        return piece

    def _start_window(self) -> None:
        """Let the bytes be the neighbours of what comes next."""
        self._window, self._byte_tokens = self._byte_tokens, []
        self._given = self._decode()

    def _give_waiting(self) -> str:
        return self._give(self._decode()) if self._num_waiting else ""

    def _give(self, text: str) -> str:
        piece = text[len(self._given) :]
        if piece or self._num_waiting >= MAX_WAITING_TOKENS:
            self._window = self._window[-self._num_waiting :]
            self._num_waiting = 0
            self._given = self._decode()
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)
