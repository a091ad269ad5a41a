"""Compiling with numba, kept on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """``function`` as machine code that runs without the interpreter's lock; compiled on its first call.

    What was compiled is found again by later processes, unless no directory that numba knows of can be written to.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


def compiled_callback(signature: Any, function: Callable[..., Any]) -> Any:
    """``function`` as a C function of this signature, compiled at once and kept like the others."""
    try:
        return numba.cfunc(signature, cache=True)(function)
    except RuntimeError:
        return numba.cfunc(signature)(function)
