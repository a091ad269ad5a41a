"""The threads of OpenMP that torch's own operations run on.

A second pool would fight with them: they go on spinning for a while after each operation.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class OpenMP:
    """GCC's entry point of a parallel region, and the addresses of two functions of OpenMP."""

    parallel: Any
    number_thread: int
    count_threads: int

    def run(self, function: int, argument: int, num_threads: int) -> None:
        """Call the C function at an address in each thread, and wait for all of them."""
        self.parallel(function, argument, num_threads, 0)


@cache
def find_openmp() -> OpenMP | None:
    """OpenMP in the library that torch has loaded, if that has the entry point which GCC gives it."""
    try:
        process = ctypes.CDLL(None)
        parallel, number, count = process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (number, count)]
    return OpenMP(parallel, *addresses)
