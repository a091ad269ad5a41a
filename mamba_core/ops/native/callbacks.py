"""What threads are given to run: a function for each kind of weights, compiled when it is first asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types

from mamba_core.ops.machine.compiling import compiled_callback, fingerprint
from mamba_core.ops.native.step_kernels import run_head, run_step
from mamba_core.ops.native.units import Kind


@cache
def step_callback(kind: Kind) -> Any:
    """``run_step`` for weights of a kind; gets the address of a plan."""
    unit, input_unit, weight_unit, staged_unit = kind.units

    source = fingerprint()

    def step(plan: int) -> int:
        run_step(unit, input_unit, weight_unit, staged_unit, plan)
        return source

    return compiled_callback(types.int64(types.int64), step)


@cache
def head_callback(kind: Kind) -> Any:
    """``run_head`` for weights of a kind; gets the address of its record."""
    unit, _, weight_unit, staged_unit = kind.units

    source = fingerprint()

    def head(record: int) -> int:
        run_head(unit, weight_unit, staged_unit, record)
        return source

    return compiled_callback(types.int64(types.int64), head)
