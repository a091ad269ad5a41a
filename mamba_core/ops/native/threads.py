"""Threads that run one compiled function together, and how they wait for each other inside of it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
import time
import weakref
from enum import IntEnum
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mamba_core.ops.machine.compiling import compiled
from mamba_core.ops.machine.instructions import I64, call
from mamba_core.ops.machine.memory import fetch_add, pointer, word
from mamba_core.ops.machine.openmp import find_openmp
from mamba_core.ops.native.crew import Crew

# looks at the counter before a waiting thread leaves its core to others
_NUM_SPINS = 2048
# the number of the system call, by architecture, and what it is asked for, within one process
_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 128, 129


class RecordField(IntEnum):
    """How the record of a function that a team runs begins: int64 values, the counters in cache lines of their own."""

    TICKETS = 0
    ARRIVALS = 16
    SLEEPERS = 24
    # waits in which a thread slept
    NUM_SLEEPS = 26
    # address of a C function that Linux has, 0 elsewhere
    SYSCALL = 25
    # addresses of functions of OpenMP, 0 without it
    NUMBER_THREAD = 32
    COUNT_THREADS = 33
    NUM_THREADS = 34
    SIZE = 35


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
        if platform.machine() in ("x86_64", "AMD64"):
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


@intrinsic
def _futex(typing: Any, syscall: Any, address: Any, operation: Any, value: Any) -> Any:
    """Linux's futex(2) on the lower half of an int64; ``syscall`` is the address of the C function."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function, address, operation, value = arguments
        kind = ir.FunctionType(I64, [I64] * 7)
        number = I64(_FUTEX_NUMBERS.get(platform.machine(), 0))
        none = I64(0)
        callee = builder.inttoptr(function, kind.as_pointer())
        return builder.call(callee, [number, address, operation, value, none, none, none])

    return types.int64(types.int64, types.int64, types.int64, types.int64), code


@compiled
def wait_for_all(record: int, num_threads: int) -> None:
    """Wait until all threads of a team are here.

    Whoever has looked for long enough sleeps: a thread that only gives way on a busy core comes back late, a sleeper
    soon after it is woken.
    """
    if num_threads == 1:
        return
    counter, sleepers = record + 8 * RecordField.ARRIVALS, record + 8 * RecordField.SLEEPERS
    syscall = word(record, RecordField.SYSCALL)
    before = fetch_add(counter, 1)
    target = (before // num_threads + 1) * num_threads
    if before + 1 == target:
        if syscall != 0 and fetch_add(sleepers, 0) > 0:
            _futex(syscall, counter, _WAKE, num_threads)
        return
    spins = 0
    while _look(counter) < target:
        spins += 1
        if spins == _NUM_SPINS:
            fetch_add(record + 8 * RecordField.NUM_SLEEPS, 1)
        if spins < _NUM_SPINS:
            _pause()
        elif syscall == 0:
            _give_way()
        else:
            fetch_add(sleepers, 1)
            seen = _look(counter)
            if seen < target:
                # returns at once if somebody has come in between
                _futex(syscall, counter, _WAIT, seen)
            fetch_add(sleepers, -1)


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
    return fetch_add(record + 8 * RecordField.TICKETS, 1), word(record, RecordField.NUM_THREADS)


class Team:
    """As many threads as torch uses, or fewer where that is faster (``Crew``): torch's own, where they are GCC's
    OpenMP, else threads that sleep between calls.

    torch's own go on spinning for a while after each of its operations, during which others could hardly run.
    """

    def __init__(self) -> None:
        self._openmp, self._syscall, self._crew = find_openmp(), _find_syscall(), Crew()
        self._helpers: list[_Helper] = []
        self._process = os.getpid()
        weakref.finalize(self, _dismiss, self._helpers)

    def run(self, function: Any, record: np.ndarray, amount: int | None = None) -> None:
        """Call a numba callback with the address of a record in each thread, and wait for all of them.

        amount: of work, if the team may learn from its time how many threads are worth having.
        """
        num_threads = self._crew.size(torch.get_num_threads())
        record[[RecordField.TICKETS, RecordField.ARRIVALS, RecordField.SLEEPERS, RecordField.NUM_SLEEPS]] = 0
        record[RecordField.SYSCALL] = self._syscall
        record[RecordField.NUM_THREADS] = num_threads
        start = time.perf_counter()
        self._call(function, record, num_threads)
        if amount is not None:
            waits = int(record[RecordField.ARRIVALS]) * (num_threads - 1) // num_threads
            sleepiness = int(record[RecordField.NUM_SLEEPS]) / max(1, waits)
            self._crew.observe(amount, time.perf_counter() - start, sleepiness)

    def _call(self, function: Any, record: np.ndarray, num_threads: int) -> None:
        address = record.ctypes.data
        if self._openmp is not None and num_threads > 1:
            record[RecordField.NUMBER_THREAD] = self._openmp.number_thread
            record[RecordField.COUNT_THREADS] = self._openmp.count_threads
            self._openmp.run(function.address, address, num_threads)
            return
        # a thread alone, or helpers of ours, take their places from the record
        record[[RecordField.NUMBER_THREAD, RecordField.COUNT_THREADS]] = 0
        helpers = self._gather(num_threads - 1)
        for helper in helpers:
            helper.start(function, address)
        function.ctypes(address)
        for helper in helpers:
            helper.wait()

    def _gather(self, num_helpers: int) -> list[_Helper]:
        # a fork has none of its parent's threads
        if self._process != os.getpid():
            _dismiss(self._helpers)
            self._helpers.clear()
            self._process = os.getpid()
        self._helpers += [_Helper() for _ in range(num_helpers - len(self._helpers))]
        return self._helpers[:num_helpers]


def _find_syscall() -> int:
    if not sys.platform.startswith("linux") or platform.machine() not in _FUTEX_NUMBERS:
        return 0
    return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0


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
