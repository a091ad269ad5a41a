"""What a start spends its time on, told in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log how long the block took; a block that raises tells its own story."""
    started = time.perf_counter()
    yield
    logger.info("%s took %.3f s", name, time.perf_counter() - started)
