"""Training rows: nothing lost, nothing padded, every rearranged piece whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.recipe.rows import arrange, build_rows, cut_pieces, split_middle
from models.recipe.stream import BatchStream, Position, ShardBuilder, StreamSettings
from models.recipe.tokenizer import (
    END_OF_TEXT_ID,
    FIM_MIDDLE_ID,
    FIM_PREFIX_ID,
    FIM_SUFFIX_ID,
    load_tokenizer,
)
from tests.models.conftest import TinyRun


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1), seed=st.integers(0, 2**32))
def test_split_parts_join_to_the_text(text: str, seed: int) -> None:
    split = split_middle(text, np.random.default_rng(seed))

    assert split.prefix + split.middle + split.suffix == text


@settings(max_examples=50, deadline=None)
@given(text=st.text(), seed=st.integers(0, 2**32))
def test_pieces_join_to_the_document(text: str, seed: int) -> None:
    assert "".join(cut_pieces(text, 8, np.random.default_rng(seed))) == text


def test_arranged_tokens_hold_the_document_in_three_parts(tiny_run: TinyRun) -> None:
    tokenizer = load_tokenizer(tiny_run.tokenizer)
    text = "def f(x):\n    return x + 1\n" * 3

    for seed in range(20):
        split = split_middle(text, np.random.default_rng(seed))
        ids = arrange(tokenizer, [split])[0].tolist()
        suffix_at, middle_at = ids.index(FIM_SUFFIX_ID), ids.index(FIM_MIDDLE_ID)
        assert ids[0] == FIM_PREFIX_ID
        assert ids[-1] == END_OF_TEXT_ID
        prefix, suffix, middle = (
            tokenizer.decode(part)
            for part in (ids[1:suffix_at], ids[suffix_at + 1 : middle_at], ids[middle_at + 1 : -1])
        )
        assert prefix + middle + suffix == text
        assert (prefix, middle, suffix) == (split.prefix, split.middle, split.suffix)


def test_rows_are_full_and_keep_arranged_pieces_whole(tiny_run: TinyRun) -> None:
    tokenizer = load_tokenizer(tiny_run.tokenizer)
    texts = ShardBuilder(stream_settings(tiny_run))._documents.take(range(8))

    rows = build_rows(tokenizer, texts, 256, 0.5, np.random.default_rng(0))

    assert rows.shape[1] == 257
    assert len(rows) > 20
    num_arranged = 0
    for row in rows.tolist():
        marks = [token for token in row if token in (FIM_PREFIX_ID, FIM_SUFFIX_ID, FIM_MIDDLE_ID)]
        assert marks == [FIM_PREFIX_ID, FIM_SUFFIX_ID, FIM_MIDDLE_ID] * (len(marks) // 3)
        num_arranged += len(marks) // 3
        if marks:
            # the end of the last piece lies in the row as well
            last_middle = len(row) - 1 - row[::-1].index(FIM_MIDDLE_ID)
            assert END_OF_TEXT_ID in row[last_middle:]
    assert num_arranged > 5


@pytest.mark.parametrize("fim_share", [0.0, 1.0])
def test_all_or_none_of_the_documents_rearranged(tiny_run: TinyRun, fim_share: float) -> None:
    tokenizer = load_tokenizer(tiny_run.tokenizer)
    texts = ["x = 1\n" * 400] * 4 if fim_share == 0.0 else ["x = 1\n" * 50] * 40

    rows = build_rows(tokenizer, texts, 64, fim_share, np.random.default_rng(0))

    assert rows.shape[1] == 65
    assert (rows == FIM_PREFIX_ID).any() == (fim_share == 1.0 and len(rows) > 0)


def stream_settings(tiny_run: TinyRun, workers: int = 0) -> StreamSettings:
    return StreamSettings(
        tiny_run.corpus, tiny_run.tokenizer, rows_per_batch=7, row_length=64, shard_bytes=50_000, workers=workers
    )


def test_every_epoch_reads_every_document_once_in_a_new_order(tiny_run: TinyRun) -> None:
    builder = ShardBuilder(stream_settings(tiny_run))
    epochs = [[number for shard in builder.shards(epoch) for number in shard] for epoch in (0, 1)]

    assert len(builder.shards(0)) > 2
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(builder._documents)))
    assert epochs[0] != epochs[1]


def test_splits_are_drawn_anew_each_epoch(tiny_run: TinyRun) -> None:
    builder = ShardBuilder(stream_settings(tiny_run))

    assert not np.array_equal(builder.rows(0, 0)[:5], builder.rows(1, 0)[:5])
    assert np.array_equal(builder.rows(0, 0), ShardBuilder(stream_settings(tiny_run)).rows(0, 0))


def test_a_stream_started_anywhere_continues_the_same_batches(tiny_run: TinyRun) -> None:
    batches: list[tuple[np.ndarray, Position]] = []
    # several shards and into the second epoch; how long one takes depends on the release of Python
    for batch in BatchStream(stream_settings(tiny_run), Position()):
        batches.append(batch)
        if batch[1].epoch >= 1 and len(batches) % 50 == 0:
            break
    num_batches = len(batches)
    assert num_batches > 200
    for start in (0, 57, 58, 59, 150, num_batches - 10):
        resumed = iter(BatchStream(stream_settings(tiny_run), batches[start][1]))
        for expected, _ in batches[start + 1 : start + 4]:
            assert np.array_equal(next(resumed)[0], expected)


def test_worker_processes_build_the_same_batches(tiny_run: TinyRun) -> None:
    alone = iter(BatchStream(stream_settings(tiny_run), Position()))
    with BatchStream(stream_settings(tiny_run, workers=1), Position()) as stream:
        ahead = iter(stream)
        for _ in range(80):
            assert np.array_equal(next(ahead)[0], next(alone)[0])
