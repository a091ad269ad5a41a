"""What needs no GPU of the evaluation: xz, the n-gram, and how much of each held-out file the training data repeats.

Run as ``python -m models.recipe.baselines FOLDER`` it works beside the training, at low priority.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
import time
from pathlib import Path
from typing import Any

from models.recipe.corpus import Documents
from models.recipe.ngram import ByteNgram, train_ngram

MAX_EVALUATED_BYTES = 48 * 1024
MIN_TELLING_LINE_BYTES = 24
RESULT = "baselines.json"


def evaluated_text(document: bytes) -> bytes:
    """The part of a held-out file that every method is measured on: whole lines up to 48 KiB."""
    if len(document) <= MAX_EVALUATED_BYTES:
        return document
    head = document[:MAX_EVALUATED_BYTES]
    end = head.rfind(b"\n") + 1
    return head[:end] if end > 0 else head.decode(errors="ignore").encode()


def evaluated_documents(corpus: Path) -> list[bytes]:
    """Every held-out file, cut as ``evaluated_text`` does."""
    heldout = Documents(corpus, "heldout")
    return [evaluated_text(heldout[index]) for index in range(len(heldout))]


def telling_lines(text: bytes) -> set[bytes]:
    """The distinct lines that are long enough to recognise a copy by."""
    return {line for line in map(bytes.strip, text.split(b"\n")) if len(line) >= MIN_TELLING_LINE_BYTES}


def repeated_shares(corpus: Path, texts: list[bytes]) -> list[float]:
    """For each text, the share of its telling lines that stand verbatim somewhere in the training data."""
    wanted = [telling_lines(text) for text in texts]
    everything = set().union(*wanted)
    seen: set[bytes] = set()
    train = Documents(corpus, "train")
    for index in range(len(train)):
        seen |= telling_lines(train[index]) & everything
    return [len(lines & seen) / len(lines) if lines else 0.0 for lines in wanted]


def xz_bits(texts: list[bytes]) -> dict[str, float]:
    """Bits of ``xz -9``: of every file alone, and of all in one stream."""
    return {
        "per_file": 8.0 * sum(len(lzma.compress(text, preset=9)) for text in texts),
        "one_stream": 8.0 * len(lzma.compress(b"".join(texts), preset=9)),
    }


def measure(corpus: Path, workers: int) -> dict[str, Any]:
    """All baselines on the held-out files; bits are totals over the evaluated bytes."""
    begin = time.monotonic()
    texts = evaluated_documents(corpus)
    ngram: ByteNgram = train_ngram(corpus, workers)
    result = {
        "bytes": [len(text) for text in texts],
        "xz_bits": xz_bits(texts),
        "ngram_bits": [ngram.bits(text) for text in texts],
        "ngram_contexts": [len(level.contexts) for level in ngram.levels],
        "ngram_train_bytes": int(Documents(corpus, "train").offsets[-1]),
        "repeated_line_share": repeated_shares(corpus, texts),
    }
    return {**result, "seconds": time.monotonic() - begin}


def measure_once(corpus: Path, workers: int) -> dict[str, Any]:
    """The cached result, or a new one."""
    path = corpus / RESULT
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(measure(corpus, workers)))
        os.replace(partial, path)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


if __name__ == "__main__":
    os.nice(10)
    measure_once(Path(sys.argv[1]), int(sys.argv[2]))
