"""Words that are not to be generated, as the tokens that spell them."""

from __future__ import annotations

from collections.abc import Sequence

from app.serving.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word at the beginning of a text and after a space, which most vocabularies join to it."""
    texts = (text for word in words for text in (word.lstrip(), " " + word.lstrip()))
    spelled = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return tuple(dict.fromkeys(ids for ids in spelled if ids))
