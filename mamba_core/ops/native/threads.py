"""Threads that run one compiled function together, and how they wait for each other inside of it."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mamba_core.ops.native.compiling import compiled
from mamba_core.ops.native.vectors import I64, call, pointer, word

# looks at the counter before a waiting thread offers its core to others
_NUM_SPINS = 4096


class RecordField(IntEnum):
    """How the record of a function that a team runs begins: int64 values, the first two alone in their cache lines."""

    TICKETS = 0
    ARRIVALS = 16
    # addresses of functions of OpenMP, 0 without it
    NUMBER_THREAD = 32
    COUNT_THREADS = 33
    NUM_THREADS = 34
    SIZE = 35


@intrinsic
def _arrive(typing: Any, counter: Any) -> Any:
    """Add one to the counter at an address; returns what it was before."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, arguments[0], I64), I64(1), "seq_cst")

    return types.int64(types.int64), code


@intrinsic
def _look(typing: Any, counter: Any) -> Any:
    """The counter at an address, with everything that was written before it was raised."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(pointer(builder, arguments[0], I64), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the core that this thread only waits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if builder.module.triple.startswith(("x86_64", "i686")):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def _give_way(typing: Any) -> Any:
    """Let another thread have the core."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if llvmlite.binding.address_of_symbol("sched_yield"):
            call(builder, "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), code


@compiled
def wait_for_all(counter: int, num_threads: int) -> None:
    """Wait until all threads are here. counter: address of an int64 that nothing else writes to; it only grows."""
    if num_threads == 1:
        return
    target = (_arrive(counter) // num_threads + 1) * num_threads
    spins = 0
    while _look(counter) < target:
        if spins < _NUM_SPINS:
            spins += 1
            _pause()
        else:
            _give_way()


@intrinsic
def _ask(typing: Any, function: Any) -> Any:
    """What the C function at an address returns, an int of no arguments."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), []), I64)

    return types.int64(types.int64), code


@compiled
def find_place(record: int) -> tuple[int, int]:
    """The number of this thread and how many there are, in a function that ``Team.run`` runs."""
    if word(record, RecordField.COUNT_THREADS) != 0:
        return _ask(word(record, RecordField.NUMBER_THREAD)), _ask(word(record, RecordField.COUNT_THREADS))
    return _arrive(record + 8 * RecordField.TICKETS), word(record, RecordField.NUM_THREADS)


class Team:
    """As many threads as torch uses: its own, where they are GCC's OpenMP, else threads that sleep between calls.

    torch's own go on spinning for a while after each of its operations, during which others could hardly run.
    """

    def __init__(self) -> None:
        self._openmp = _find_openmp()
        self._helpers: list[_Helper] = []
        self._process = os.getpid()
        weakref.finalize(self, _dismiss, self._helpers)

    def run(self, function: Any, record: np.ndarray) -> None:
        """Call a numba callback with the address of a record in each thread, and wait for all of them."""
        num_threads, address = torch.get_num_threads(), record.ctypes.data
        record[RecordField.TICKETS] = record[RecordField.ARRIVALS] = 0
        record[RecordField.NUM_THREADS] = num_threads
        if self._openmp is not None:
            record[RecordField.NUMBER_THREAD] = self._openmp.number_thread
            record[RecordField.COUNT_THREADS] = self._openmp.count_threads
            self._openmp.parallel(function.address, address, num_threads, 0)
            return
        self._gather(num_threads - 1)
        for helper in self._helpers:
            helper.start(function, address)
        function.ctypes(address)
        for helper in self._helpers:
            helper.wait()

    def _gather(self, num_helpers: int) -> None:
        # a fork has none of its parent's threads
        if len(self._helpers) != num_helpers or self._process != os.getpid():
            _dismiss(self._helpers)
            self._helpers[:] = [_Helper() for _ in range(num_helpers)]
            self._process = os.getpid()


@dataclass(frozen=True, slots=True)
class _OpenMP:
    """GCC's entry point of a parallel region, and the addresses of two functions of OpenMP."""

    parallel: Any
    number_thread: int
    count_threads: int


def _find_openmp() -> _OpenMP | None:
    try:
        process = ctypes.CDLL(None)
        parallel, number, count = process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (number, count)]
    return _OpenMP(parallel, *addresses)


class _Helper:
    """A thread that sleeps until it is given work."""

    def __init__(self) -> None:
        self._work: tuple[Any, int] | None = None
        self._call, self._done = threading.Lock(), threading.Lock()
        self._call.acquire()
        self._done.acquire()
        threading.Thread(target=self._serve, name="step", daemon=True).start()

    def start(self, function: Any, address: int) -> None:
        self._work = function, address
        self._call.release()

    def wait(self) -> None:
        self._done.acquire()

    def dismiss(self) -> None:
        self._work = None
        self._call.release()

    def _serve(self) -> None:
        while True:
            self._call.acquire()
            if self._work is None:
                return
            function, address = self._work
            function.ctypes(address)
            self._done.release()


def _dismiss(helpers: list[_Helper]) -> None:
    for helper in helpers:
        helper.dismiss()
