"""The n-gram is a probability distribution, and its counts are those of the text."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.recipe.baselines import evaluated_text, measure, repeated_shares, xz_bits
from models.recipe.corpus import Documents, write_documents
from models.recipe.ngram import ORDER, ByteNgram, pack_keys, sum_equal, train_ngram
from tests.models.conftest import TinyRun


def model_of(documents: list[bytes]) -> ByteNgram:
    keys = pack_keys(documents)
    return ByteNgram(*sum_equal(keys, np.ones(len(keys), dtype=np.int64)))


def test_keys_hold_a_byte_and_its_five_predecessors() -> None:
    keys = pack_keys([b"abcdefg", b"xy"])

    assert len(keys) == 9
    assert [int(key).to_bytes(8, "big")[2:] for key in keys[[0, 6, 7, 8]]] == [
        b"\0\0\0\0\0a",
        b"bcdefg",
        b"\0\0\0\0\0x",
        b"\0\0\0\0xy",
    ]


@pytest.mark.parametrize("context", [b"", b"a", b"abrac", b"zzzzz", b"bra a", b"brac\xff"])
def test_probabilities_of_all_bytes_sum_to_one(context: bytes) -> None:
    model = model_of([b"abracadabra", b"abra abra"])
    prefix = int.from_bytes(context.rjust(ORDER, b"\0"), "big") << 8
    keys = np.array([prefix | byte for byte in range(256)], dtype=np.uint64)

    probabilities = model.probabilities(keys)

    assert probabilities.sum() == pytest.approx(1)
    assert (probabilities > 0).all()


def test_one_level_by_hand() -> None:
    # "aab": unigrams n(a)=2, n(b)=1, t=2; the context "" of length 0
    model = model_of([b"aab"])
    unigram = model.levels[0].interpolate(np.array([97, 98, 99], dtype=np.uint64), np.full(3, 1 / 256))

    assert unigram == pytest.approx([(2 + 2 / 256) / 5, (1 + 2 / 256) / 5, (2 / 256) / 5])


def test_code_length_is_the_sum_over_the_bytes_one_by_one() -> None:
    model = model_of([b"def f(x):\n    return x\n" * 5])
    text = b"def g(y):\n"

    one_by_one = sum(-math.log2(model.probabilities(key[None])[0]) for key in pack_keys([text]))

    assert model.bits(text) == pytest.approx(one_by_one)
    assert model.bits(b"def f(x):\n") < model.bits(b"\xff" * 10) / 10


def test_chunks_and_processes_do_not_change_the_counts(tiny_run: TinyRun) -> None:
    documents = Documents(tiny_run.corpus, "train")
    whole = model_of([documents[index] for index in range(len(documents))])
    chunked = train_ngram(tiny_run.corpus, workers=1, chunk_bytes=20_000)

    for first, second in zip(whole.levels, chunked.levels, strict=True):
        assert np.array_equal(first.keys, second.keys)
        assert np.array_equal(first.counts, second.counts)
    assert int(chunked.levels[0].counts.sum()) == int(documents.offsets[-1])


def test_baselines_cover_the_same_bytes(tiny_run: TinyRun) -> None:
    result = measure(tiny_run.corpus, workers=1)

    assert len(result["bytes"]) == len(result["ngram_bits"]) == len(Documents(tiny_run.corpus, "heldout"))
    per_byte = sum(result["ngram_bits"]) / sum(result["bytes"])
    assert 1 < per_byte < 5
    assert result["xz_bits"]["one_stream"] <= result["xz_bits"]["per_file"]


def test_long_files_are_cut_at_a_line() -> None:
    text = b"# twenty-four bytes line\n" * 4_000

    cut = evaluated_text(text)

    assert len(cut) <= 48 * 1024
    assert text.startswith(cut)
    assert cut.endswith(b"\n")
    assert evaluated_text(b"\xc3\xa9" * 40_000).decode()


def test_repeated_lines_are_counted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    lines = [f"this is a long enough line number {number}".encode() for number in range(4)]
    write_documents(tmp_path, "train", [lines[0] + b"\n", b"    " + lines[1] + b"\nshort\n"])

    shares = repeated_shares(tmp_path, [b"\n".join(lines), lines[0] + b"\nshort", b"short"])

    assert shares == [0.5, 1.0, 0.0]


def test_xz_of_one_stream_uses_what_files_share() -> None:
    bits = xz_bits([b"some text that repeats" * 20] * 5)

    assert bits["one_stream"] < bits["per_file"] / 3
