"""The text of a prompt to tokens, where only the template may write control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from app.serving.tokenizer import Tokenizer

# noncharacters of Unicode (U+FDD0 to U+FDEF): no text for interchange holds them, and one that does is kept as it is
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# Unicode's, which tokens that take the space beside them go by; str.strip() would take U+001C to U+001F as well
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


class ControlTokens:
    """Control tokens in prompts: those of the template are tokens, those in what a client wrote are text.

    What a client writes goes through ``shield`` before it is rendered, which puts a mark in place of every text that
    looks like a control token; ``encode`` takes the control tokens for what they are and the marks for what they hide.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._id_of = {token.content: index for index, token in tokenizer.special_tokens.items() if token.content}
        texts = sorted(self._id_of, key=len, reverse=True)
        self._hidden = (*texts, _OPEN)
        self._number_of = {text: number for number, text in enumerate(self._hidden)}
        self._shielded = re.compile("|".join(map(re.escape, self._hidden)))
        self._marks = re.compile(f"{_OPEN}([0-9]{{1,9}}){_CLOSE}")
        self._splits = re.compile("|".join(map(re.escape, texts))) if texts else None

    def id_of(self, text: str) -> int | None:
        """The control token of that text."""
        return self._id_of.get(text)

    def shield(self, value: Any) -> Any:
        """The same with marks: texts, and lists and objects of them."""
        if isinstance(value, str):
            return self._shielded.sub(self._mark, value)
        if isinstance(value, list):
            return [self.shield(item) for item in value]
        if isinstance(value, dict):
            return {self.shield(key): self.shield(item) for key, item in value.items()}
        return value

    def reveal(self, text: str) -> str:
        """The text without marks."""
        return self._marks.sub(self._unmark, text) if _OPEN in text else text

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a rendered prompt."""
        pieces = list(self._pieces(text))
        texts = [self.reveal(piece) for piece in pieces if isinstance(piece, str)]
        encoded = iter(self._tokenizer.encode_each(texts))
        ids = [index for piece in pieces for index in ((piece,) if isinstance(piece, int) else next(encoded))]
        if not add_special_tokens:
            return ids
        before, after = self._frame()
        return [*before, *ids, *after]

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text by itself."""
        plain = self._tokenizer.encode("a", add_special_tokens=False)
        framed = self._tokenizer.encode("a")
        num_before = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
        return framed[:num_before], framed[num_before + len(plain) :]

    def _pieces(self, text: str) -> Iterator[str | int]:
        """Control tokens and what stands between them, without the white space that the tokens take."""
        start, takes_space = 0, False
        for match in self._splits.finditer(text) if self._splits is not None else ():
            index = self._id_of[match[0]]
            token = self._tokenizer.special_tokens[index]
            piece = text[start : match.start()]
            piece = piece.lstrip(_WHITE_SPACE) if takes_space else piece
            piece = piece.rstrip(_WHITE_SPACE) if token.lstrip else piece
            if piece:
                yield piece
            yield index
            start, takes_space = match.end(), token.rstrip
        piece = text[start:].lstrip(_WHITE_SPACE) if takes_space else text[start:]
        if piece:
            yield piece

    def _mark(self, match: re.Match[str]) -> str:
        return f"{_OPEN}{self._number_of[match[0]]}{_CLOSE}"

    def _unmark(self, match: re.Match[str]) -> str:
        number = int(match[1])
        return self._hidden[number] if number < len(self._hidden) else str(match[0])
