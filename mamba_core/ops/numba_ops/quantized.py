"""Matrices of int8 weights as those of another type, for a product with many rows: one task is a few outputs."""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from mamba_core.ops.machine.compiling import compiled_callback, fingerprint
from mamba_core.ops.machine.instructions import I8, I64, LANES, VF32, VI32, lanes_below
from mamba_core.ops.machine.lanes import lanes, splat
from mamba_core.ops.machine.memory import masked_load, pointer
from mamba_core.ops.numba_ops.sized import WIDTH, load_float, store
from mamba_core.ops.numba_ops.team import expect, flat, record_of, run, take_tasks

# numbers of a task, for which a thread is worth its while
_NUMBERS_PER_TASK = 1 << 16

_ARGUMENTS = record_of(
    ("next_task", "num_tasks", "num_outputs", "outputs_per_task", "length", "weight", "scales", "result", "size")
)


@intrinsic
def _load_int8(typing: Any, address: Any, count: Any) -> Any:
    """The first ``count`` of 16 int8 values, as fp32."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        with builder.if_else(builder.icmp_signed(">=", count, I64(LANES))) as (whole, part):
            with whole:
                full = builder.load(pointer(builder, address, ir.VectorType(I8, LANES)), align=1)
                full_block = builder.block
            with part:
                some = masked_load(builder, address, lanes_below(builder, count), I8, 1)
                some_block = builder.block
        raw = builder.phi(full.type)
        raw.add_incoming(full, full_block)
        raw.add_incoming(some, some_block)
        return builder.sitofp(builder.sext(raw, VI32), VF32)

    return lanes(types.int64, types.int64), code


@njit(error_model="numpy")
def _widen_task(a: Any, task: int) -> None:
    """A few outputs, times their scales."""
    for output in range(task * a.outputs_per_task, min((task + 1) * a.outputs_per_task, a.num_outputs)):
        scale = splat(load_float(a.scales + 4 * output))
        weight, result = a.weight + output * a.length, a.result + output * a.length * a.size
        for first in range(0, a.length, WIDTH):
            count = a.length - first
            store(result + first * a.size, _load_int8(weight + first, count) * scale, a.size, count)


def _compile_tasks() -> Any:
    source = fingerprint()

    def widen_tasks(pointer: Any) -> int:
        take_tasks(pointer, _widen_task)
        return source

    return compiled_callback(types.int64(_ARGUMENTS), widen_tasks)


_widen_tasks = _compile_tasks()


def dequantize(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [N, K] int8, scales [N] fp32 -> weight * scales in a dtype, fp32 or bfloat16."""
    num_outputs, length = weight.shape
    expect(weight=(weight, (num_outputs, length)), scales=(scales, (num_outputs,)))
    if weight.dtype != torch.int8 or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"int8 becomes fp32 or bfloat16, got {weight.dtype} and {dtype}")
    weight, scales = weight.contiguous(), flat(scales)
    result = torch.empty(num_outputs, length, dtype=dtype)
    outputs_per_task = max(1, _NUMBERS_PER_TASK // max(1, length))
    run(
        _widen_tasks,
        (
            *(num_outputs, outputs_per_task, length),
            *(weight.data_ptr(), scales.data_ptr(), result.data_ptr(), result.itemsize),
        ),
        -(-num_outputs // outputs_per_task),
    )
    return result
