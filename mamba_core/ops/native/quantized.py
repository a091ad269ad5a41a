"""Products with int8 weights that have one scale per output.

Where int8 is multiplied by int16, each row of inputs becomes int16 with a scale of its own. That loses less than the
rounding of inputs to bfloat16 does; sums are exact. Elsewhere weights are widened to fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from mamba_core.ops.machine.compiling import compiled
from mamba_core.ops.machine.instructions import I64, LANES, VF32, VI16, call, lanes_below
from mamba_core.ops.machine.lanes import lanes, larger, largest, magnitude, splat
from mamba_core.ops.machine.memory import load, load_scalar, masked_store, pointer, store, store_scalar
from mamba_core.ops.native.products import multiply

# outputs that are scaled while they are in the nearest cache
_BLOCK = 64


def product(
    unit: Any,
    inputs: int,
    input_stride: int,
    num_rows: int,
    weights: int,
    scales: int,
    length: int,
    results: int,
    result_stride: int,
    first: int,
    end: int,
    room: int,
    room_stride: int,
) -> None:
    """``products.multiply`` for weights of any unit; compiled functions call it.

    scales: address of one fp32 per output, for int8 alone, whose inputs are fp32. room: scratch memory of this thread,
    a row of 4 + 2 * length bytes for each row of inputs, where int8 (not uint8) is the unit.
    """
    raise NotImplementedError("this is for compiled functions")


@overload(product, strict=False)
def _choose_product(
    unit: Any,
    inputs: Any,
    input_stride: Any,
    num_rows: Any,
    weights: Any,
    scales: Any,
    length: Any,
    results: Any,
    result_stride: Any,
    first: Any,
    end: Any,
    room: Any,
    room_stride: Any,
) -> Any:
    if unit == types.int8:
        return _by_rounded_inputs
    return _by_scaled_weights if unit == types.uint8 else _by_weights


def _by_weights(
    unit, inputs, input_stride, num_rows, weights, scales, length, results, result_stride, first, end, room, room_stride
):
    multiply(unit, inputs, input_stride, num_rows, weights, length, results, result_stride, first, end)


def _by_scaled_weights(
    unit, inputs, input_stride, num_rows, weights, scales, length, results, result_stride, first, end, room, room_stride
):
    for begin in range(first, end, _BLOCK):
        stop = min(begin + _BLOCK, end)
        multiply(unit, inputs, input_stride, num_rows, weights, length, results, result_stride, begin, stop)
        for row in range(num_rows):
            scale_results(scales, np.float32(1), results + row * result_stride, begin, stop)


def _by_rounded_inputs(
    unit, inputs, input_stride, num_rows, weights, scales, length, results, result_stride, first, end, room, room_stride
):
    for row in range(num_rows):
        round_row(inputs + row * input_stride, length, room + row * room_stride)
    for begin in range(first, end, _BLOCK):
        stop = min(begin + _BLOCK, end)
        # the scale of a row lies before it
        multiply(unit, room + 64, room_stride, num_rows, weights, length, results, result_stride, begin, stop)
        for row in range(num_rows):
            scale = load_scalar(np.float32(0), room + row * room_stride)
            scale_results(scales, scale, results + row * result_stride, begin, stop)


@intrinsic
def store_rounded(typing: Any, address: Any, vector: Any, count: Any) -> Any:
    """Write the first ``count`` of 16 values as the nearest int16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, vector, count = arguments
        nearest = call(builder, "llvm.rint.v16f32", VF32, vector)
        # NaN becomes 0, and is known by the scale
        whole = call(builder, "llvm.fptosi.sat.v16i16.v16f32", VI16, nearest)
        with builder.if_else(builder.icmp_signed(">=", count, I64(LANES))) as (full, part):
            with full:
                builder.store(whole, pointer(builder, address, VI16), align=2)
            with part:
                masked_store(builder, whole, address, lanes_below(builder, count), 2)
        return context.get_dummy_value()

    return types.void(types.int64, lanes, types.int64), code


@compiled
def round_row(inputs: int, length: int, room: int) -> None:
    """fp32 values as int16, 64 bytes behind their scale."""
    top = splat(np.float32(0))
    for i in range(0, length, 16):
        top = larger(magnitude(load(np.float32(0), inputs + 4 * i, length - i)), top)
    peak = largest(top)
    # the sum of all pairs of products in a lane stays within int32
    limit = np.float32(min(32767, 2147483647 // (254 * ((length + 31) // 32))))
    store_scalar(np.float32(0), room, np.float32(peak / limit))
    gain = np.float32(limit / peak) if peak > np.float32(1e-30) else np.float32(0)
    for i in range(0, length, 16):
        value = load(np.float32(0), inputs + 4 * i, length - i) * splat(gain)
        store_rounded(room + 64 + 2 * i, value, length - i)


@compiled
def scale_results(scales: int, scale: float, results: int, first: int, end: int) -> None:
    """Multiply results by the scale of their output and by that of their row."""
    for o in range(first, end, 16):
        factor = load(np.float32(0), scales + 4 * o, end - o) * splat(np.float32(scale))
        value = load(np.float32(0), results + 4 * o, end - o) * factor
        store(np.float32(0), results + 4 * o, value, end - o)
