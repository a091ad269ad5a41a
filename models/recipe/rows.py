"""Cuts documents into training rows: half of them plain text end to end, half rearranged to fill in the middle.

A rearranged piece always lies whole inside one row, ``<|fim_prefix|>`` prefix ``<|fim_suffix|>`` suffix
``<|fim_middle|>`` middle ``<|endoftext|>``, split between any two characters. What it leaves of the row is filled
with plain text, so that no position is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from models.recipe.tokenizer import END_OF_TEXT_ID, FIM_MIDDLE_ID, FIM_PREFIX_ID, FIM_SUFFIX_ID

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.uint16]]

# at about three characters a token, most pieces fit a row of 1,024 tokens; those that do not stay plain
CHARS_PER_ROW_TOKEN = 2.5
MAX_SHORT_MIDDLE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Split:
    """A text in three parts; ``prefix + middle + suffix`` is the text."""

    prefix: str
    middle: str
    suffix: str


def split_middle(text: str, rng: np.random.Generator) -> Split:
    """Two random cuts: half of the time anywhere, half of the time around a short middle as an editor asks for."""
    if rng.random() < 0.5:
        begin, end = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    else:
        begin = int(rng.integers(0, len(text) + 1))
        end = min(len(text), begin + int(rng.integers(1, MAX_SHORT_MIDDLE_CHARS + 1)))
    return Split(text[:begin], text[begin:end], text[end:])


def cut_pieces(text: str, row_length: int, rng: np.random.Generator) -> list[str]:
    """A document in pieces of random length, short enough for one row each at the usual characters per token."""
    longest = max(2, int(row_length * CHARS_PER_ROW_TOKEN))
    pieces = []
    begin = 0
    while begin < len(text):
        end = begin + int(rng.integers(max(1, longest // 8), longest + 1))
        pieces.append(text[begin:end])
        begin = end
    return pieces


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Rows]:
    """Token ids of each text, without special tokens."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]


def arrange(tokenizer: Tokenizer, splits: Sequence[Split]) -> list[Rows]:
    """Each split as one token sequence in prefix-suffix-middle order."""
    parts = [part for split in splits for part in (split.prefix, split.suffix, split.middle)]
    ids = encode(tokenizer, parts)
    marks = [np.array([mark], dtype=np.uint16) for mark in (FIM_PREFIX_ID, FIM_SUFFIX_ID, FIM_MIDDLE_ID)]
    end = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    return [
        np.concatenate([marks[0], ids[i], marks[1], ids[i + 1], marks[2], ids[i + 2], end])
        for i in range(0, len(ids), 3)
    ]


def build_rows(
    tokenizer: Tokenizer, texts: Sequence[str], row_length: int, fim_share: float, rng: np.random.Generator
) -> Rows:
    """Rows [n, row_length + 1] in random order: inputs and targets of ``row_length`` positions each.

    ``fim_share`` of the documents are rearranged. What does not fill the last row is dropped.
    """
    is_fim = rng.random(len(texts)) < fim_share
    pieces = [
        piece
        for text, chosen in zip(texts, is_fim, strict=True)
        if chosen
        for piece in cut_pieces(text, row_length, rng)
    ]
    arranged = arrange(tokenizer, [split_middle(piece, rng) for piece in pieces])
    units = [ids for ids in arranged if len(ids) <= row_length + 1]
    too_long = [pieces[i] for i, ids in enumerate(arranged) if len(ids) > row_length + 1]
    plain = [text for text, chosen in zip(texts, is_fim, strict=True) if not chosen] + too_long
    end = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    stream = np.concatenate([np.append(ids, end) for ids in encode(tokenizer, plain)] or [end[:0]])
    rows = np.array(list(_pack(units, stream, row_length + 1)), dtype=np.uint16).reshape(-1, row_length + 1)
    return rows[rng.permutation(len(rows))]


def _pack(units: Sequence[Rows], stream: Rows, width: int) -> Iterator[Rows]:
    """Rows of ``width`` tokens: whole units first, each row topped up from the plain stream, then plain rows."""
    position = 0
    row: list[Rows] = []
    free = width
    for unit in units:
        if len(unit) > free:
            if position + free > len(stream):
                return
            yield np.concatenate([*row, stream[position : position + free]])
            position, row, free = position + free, [], width
        row.append(unit)
        free -= len(unit)
    if position + free > len(stream):
        return
    yield np.concatenate([*row, stream[position : position + free]])
    position += free
    for begin in range(position, len(stream) - width + 1, width):
        yield stream[begin : begin + width]
