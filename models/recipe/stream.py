"""The endless, reproducible sequence of training batches, encoded ahead by worker processes.

An epoch is a permutation of all documents cut into shards; a shard's rows depend on the seed, the epoch and the
shard's number alone. A position in the sequence is therefore three numbers, and a run resumes exactly there.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from models.recipe.corpus import Documents
from models.recipe.rows import Rows, build_rows
from models.recipe.tokenizer import load_tokenizer
from models.recipe.workers import worker_pool


@dataclass(frozen=True, slots=True)
class Position:
    """The next unread row: number ``row`` of shard ``shard`` of epoch ``epoch``."""

    epoch: int = 0
    shard: int = 0
    row: int = 0

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """shard_bytes: text per unit of work; workers: encoding processes (0 encodes in this one)."""

    corpus: Path
    tokenizer: Path
    rows_per_batch: int
    row_length: int = 1024
    fim_share: float = 0.5
    shard_bytes: int = 4_000_000
    seed: int = 0
    workers: int = 4


class ShardBuilder:
    """Encodes any shard of any epoch."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self._documents = Documents(settings.corpus, "train")
        self._tokenizer = load_tokenizer(settings.tokenizer)
        self._epoch = -1
        self._shards: list[list[int]] = []

    def shards(self, epoch: int) -> list[list[int]]:
        """The document numbers of each shard of an epoch."""
        if epoch != self._epoch:
            order = np.random.default_rng((self._settings.seed, epoch)).permutation(len(self._documents))
            sizes = np.diff(self._documents.offsets)[order]
            # the shard of a document is the number of whole shards that lie before its first byte
            numbers = (np.cumsum(sizes) - sizes) // self._settings.shard_bytes
            bounds = np.flatnonzero(np.diff(numbers)) + 1
            self._shards = [part.tolist() for part in np.split(order, bounds)]
            self._epoch = epoch
        return self._shards

    def rows(self, epoch: int, shard: int) -> Rows:
        """The rows of one shard, in their final order."""
        settings = self._settings
        texts = self._documents.take(self.shards(epoch)[shard])
        rng = np.random.default_rng((settings.seed, epoch, shard))
        return build_rows(self._tokenizer, texts, settings.row_length, settings.fim_share, rng)


class _Worker:
    """The builder of a worker process, made once per process by its initialiser."""

    builder: ShardBuilder | None = None


def _start_worker(settings: StreamSettings) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.builder = ShardBuilder(settings)


def _work(epoch: int, shard: int) -> Rows:
    if _Worker.builder is None:
        raise RuntimeError("the worker process was not initialised")
    return _Worker.builder.rows(epoch, shard)


class BatchStream:
    """Batches [rows_per_batch, row_length + 1] from a position on, each with the position behind it."""

    def __init__(self, settings: StreamSettings, start: Position) -> None:
        self._settings = settings
        self._start = start
        self._builder = ShardBuilder(settings)
        self._pool: ProcessPoolExecutor | None = None
        if settings.workers > 0:
            self._pool = worker_pool(settings.workers, _start_worker, (settings,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Rows, Position]]:
        size = self._settings.rows_per_batch
        held: list[Rows] = []
        num_held = 0
        for rows, position in self._shards():
            begin = position.row
            while num_held + len(rows) - begin >= size:
                end = begin + size - num_held
                yield np.concatenate([*held, rows[begin:end]]), replace(position, row=end)
                held, num_held, begin = [], 0, end
            held.append(rows[begin:])
            num_held += len(rows) - begin

    def _shards(self) -> Iterator[tuple[Rows, Position]]:
        """Each shard's rows with the position of its first unread row."""
        if self._pool is None:
            for position in self._positions():
                yield self._builder.rows(position.epoch, position.shard), position
            return
        pending: deque[tuple[Future[Rows], Position]] = deque()
        for position in self._positions():
            pending.append((self._pool.submit(_work, position.epoch, position.shard), position))
            if len(pending) > 2 * self._settings.workers:
                future, first = pending.popleft()
                yield future.result(), first

    def _positions(self) -> Iterator[Position]:
        position = self._start
        while True:
            yield position
            position = Position(position.epoch, position.shard + 1)
            if position.shard == len(self._builder.shards(position.epoch)):
                position = Position(position.epoch + 1, 0)
