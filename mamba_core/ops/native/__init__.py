"""The decode step on a CPU, compiled by numba when it is first made."""

from __future__ import annotations

import importlib.util


def is_available() -> bool:
    """Whether there is a compiler to make it with."""
    return importlib.util.find_spec("numba") is not None
