"""Compiling with numba, kept on disk where that is possible."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

# whatever kernels are made of lies in these, below one directory
_ROOMS = ("machine", "native", "numba_ops")


def compiled(function: Callable[..., Any]) -> Any:
    """``function`` as machine code, for others that are compiled; made with the first of them."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def compiled_callback(signature: Any, function: Callable[..., Any]) -> Any:
    """``function`` as a C function of this signature, compiled at once.

    Later processes find it again, unless no directory that numba knows of can be written to. Numba tells by the
    function alone whether what it finds is still right: it must refer to ``fingerprint()`` as a variable of its own.
    """
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):
        return numba.cfunc(signature, error_model="numpy")(function)


@cache
def fingerprint() -> int:
    """A number that changes with the source of any kernel."""
    rooms, total = Path(__file__).parents[1], 0
    for path in sorted(path for room in _ROOMS for path in rooms.joinpath(room).glob("*.py")):
        total = zlib.crc32(path.read_bytes(), total)
    return total
