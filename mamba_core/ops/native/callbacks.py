"""What threads are given to run: a function for each kind of weights, compiled when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from mamba_core.ops.native.compiling import compiled_callback
from mamba_core.ops.native.step_kernels import run_head, run_step
from mamba_core.ops.native.units import Kind


def _step_float32(record: int) -> None:
    run_step(np.float32(0), np.float32(0), record)


def _step_pairs(record: int) -> None:
    run_step(np.uint16(0), np.uint16(0), record)


def _step_widened(record: int) -> None:
    run_step(np.int16(0), np.float32(0), record)


def _head_float32(record: int) -> None:
    run_head(np.float32(0), np.float32(0), record)


def _head_pairs(record: int) -> None:
    run_head(np.uint16(0), np.uint16(0), record)


def _head_widened(record: int) -> None:
    run_head(np.int16(0), np.float32(0), record)


_STEPS = {Kind.FLOAT32: _step_float32, Kind.PAIRS: _step_pairs, Kind.WIDENED: _step_widened}
_HEADS = {Kind.FLOAT32: _head_float32, Kind.PAIRS: _head_pairs, Kind.WIDENED: _head_widened}


@cache
def step_callback(kind: Kind) -> Any:
    """``run_step`` for weights of a kind; gets the address of a plan."""
    return _callback(_STEPS[kind])


@cache
def head_callback(kind: Kind) -> Any:
    """``run_head`` for weights of a kind; gets the address of its record."""
    return _callback(_HEADS[kind])


def _callback(function: Callable[[int], None]) -> Any:
    return compiled_callback(types.void(types.int64), function)
