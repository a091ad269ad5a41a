"""An order-5 byte model: the probability of a byte given the five before it, interpolated over all shorter contexts.

Witten & Bell 1991 (method C): p_k(c) = (n(context, c) + t(context) p_{k-1}(c)) / (n(context) + t(context)), where n
counts occurrences, t counts distinct successors, and p_{-1} is uniform over the 256 bytes. A byte and its context are
packed into one 48-bit integer, so that counting is sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from models.recipe.corpus import Documents
from models.recipe.workers import worker_pool

ORDER = 5

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Keys: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Probabilities: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def pack_keys(documents: Sequence[bytes]) -> Keys:
    """One key per byte of the documents: five bytes of context, then the byte; NUL stands before a document."""
    padded = np.frombuffer(b"".join(b"\x00" * ORDER + document for document in documents), dtype=np.uint8)
    num_windows = max(0, len(padded) - ORDER)
    keys = np.zeros(num_windows, dtype=np.uint64)
    for i in range(ORDER + 1):
        keys = (keys << np.uint64(8)) | padded[i : i + num_windows].astype(np.uint64)
    # documents hold no NUL: a window that ends in one ends in the padding
    inside: Keys = keys[(keys & np.uint64(255)) != 0]
    return inside


def sum_equal(keys: Keys, counts: Counts) -> tuple[Keys, Counts]:
    """Sorted distinct keys and the sums of their counts."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts, first)


@dataclass(frozen=True, slots=True)
class Level:
    """Counts at one context length: sorted (context, byte) keys, and for sorted contexts their n and t."""

    keys: Keys
    counts: Counts
    contexts: Keys
    totals: Counts
    distinct: Counts

    @classmethod
    def from_counts(cls, keys: Keys, counts: Counts) -> Level:
        """From sorted distinct keys."""
        contexts, first, distinct = np.unique(keys >> np.uint64(8), return_index=True, return_counts=True)
        return cls(keys, counts, contexts, np.add.reduceat(counts, first), distinct)

    def interpolate(self, keys: Keys, shorter: Probabilities) -> Probabilities:
        """Witten-Bell: ``shorter`` mixed with this level's counts; where the context is unknown, ``shorter`` itself."""
        counts = _look_up(self.keys, self.counts, keys)
        contexts = keys >> np.uint64(8)
        totals = _look_up(self.contexts, self.totals, contexts)
        distinct = _look_up(self.contexts, self.distinct, contexts)
        seen = totals > 0
        mixed = (counts + distinct * shorter) / np.where(seen, totals + distinct, 1)
        return np.where(seen, mixed, shorter)


def _look_up(table: Keys, values: Counts, wanted: Keys) -> Counts:
    index = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[index] == wanted, values[index], 0)


class ByteNgram:
    """The model; levels[k] holds contexts of k bytes."""

    def __init__(self, keys: Keys, counts: Counts) -> None:
        """``keys`` are sorted and distinct, as ``sum_equal`` returns them."""
        levels = [Level.from_counts(keys, counts)]
        for length in reversed(range(ORDER)):
            keys, counts = sum_equal(keys & np.uint64((1 << 8 * (length + 1)) - 1), counts)
            levels.append(Level.from_counts(keys, counts))
        self.levels = levels[::-1]

    def probabilities(self, keys: Keys) -> Probabilities:
        """The probability of each key's byte given its context."""
        result = np.full(len(keys), 1 / 256)
        for length, level in enumerate(self.levels):
            mask = np.uint64((1 << 8 * (length + 1)) - 1)
            result = level.interpolate(keys & mask, result)
        return result

    def bits(self, document: bytes) -> float:
        """The document's code length, from the empty context on."""
        return float(-np.log2(self.probabilities(pack_keys([document]))).sum())


def _count(folder: Path, begin: int, end: int) -> tuple[Keys, Counts]:
    documents = Documents(folder, "train")
    keys = pack_keys([documents[index] for index in range(begin, end)])
    unique, counts = np.unique(keys, return_counts=True)
    return unique, counts.astype(np.int64)


def train_ngram(folder: Path, workers: int, chunk_bytes: int = 8_000_000) -> ByteNgram:
    """Count every training document of a corpus."""
    offsets = Documents(folder, "train").offsets
    num_chunks = max(1, int(offsets[-1]) // chunk_bytes)
    bounds = np.searchsorted(offsets, np.linspace(0, offsets[-1], num_chunks + 1)).tolist()
    begins, ends = bounds[:-1], bounds[1:]
    if workers > 1:
        with worker_pool(workers) as pool:
            parts = list(pool.map(_count, [folder] * num_chunks, begins, ends))
    else:
        parts = [_count(folder, begin, end) for begin, end in zip(begins, ends, strict=True)]
    keys = np.concatenate([part[0] for part in parts])
    counts = np.concatenate([part[1] for part in parts])
    return ByteNgram(*sum_equal(keys, counts))
