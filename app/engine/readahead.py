"""Brings a checkpoint's weights into memory while the libraries that will read them are still loading."""

from __future__ import annotations

import os
import threading
from pathlib import Path

_PATTERNS = ("*.safetensors", "*.bin")


def read_ahead(model: str) -> threading.Thread | None:
    """Ask the system, from a thread of its own, to read the weights in a directory into its page cache.

    A hint, nothing more: without effect where the system takes none, where the weights are there already, and for what
    is no directory. Returns the thread, None if there is nothing to ask for.
    """
    directory = Path(model).expanduser()
    if not hasattr(os, "posix_fadvise") or not directory.is_dir():
        return None
    thread = threading.Thread(target=_advise, args=(directory,), daemon=True, name="readahead")
    thread.start()
    return thread


def _advise(directory: Path) -> None:
    for pattern in _PATTERNS:
        for file in sorted(directory.glob(pattern)):
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError:
                # who reads the checkpoint will say what is wrong with it
                continue
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            except OSError:
                continue
            finally:
                os.close(descriptor)
