"""Pools of worker processes that end with the process that made them, however it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any


def worker_pool(
    workers: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """A pool of freshly started interpreters (a fork would copy threads' locks and a CUDA context)."""
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, initargs=(initializer, initargs)
    )


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    # the executor's workers wait for work for ever when their parent was killed
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
