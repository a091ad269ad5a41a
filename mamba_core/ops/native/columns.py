"""Sixteen channels whose values lie channel after channel: their inputs as columns, and their states."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mamba_core.ops.machine.instructions import F32, I32, I64, LANES, VI32, exp2, fma, splat, sums
from mamba_core.ops.machine.lanes import lanes
from mamba_core.ops.machine.memory import load_memory, pointer, store_memory


@intrinsic
def advance_16(
    typing: Any,
    state: Any,
    decay: Any,
    rates: Any,
    gains: Any,
    b: Any,
    c: Any,
) -> Any:
    """One step of the states [16, 16] of 16 channels in place; returns each channel's sum of C * h.

    h = 2**(rate * decay) * h + gain * B. state, decay [16, 16], rates, gains [16]: addresses of fp32 values.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        state, decay, rates, gains, b, c = arguments
        products = []
        for channel in range(LANES):
            own, row = I64(4 * channel), I64(4 * LANES * channel)
            rate = splat(builder, builder.load(pointer(builder, builder.add(rates, own), F32)))
            gain = splat(builder, builder.load(pointer(builder, builder.add(gains, own), F32)))
            a = load_memory(builder, types.float32, builder.add(decay, row))
            where = builder.add(state, row)
            h = load_memory(builder, types.float32, where)
            h = fma(builder, exp2(builder, builder.fmul(rate, a)), h, builder.fmul(gain, b))
            store_memory(builder, types.float32, where, h)
            products.append(builder.fmul(h, c))
        return sums(builder, products)

    return lanes(*[types.int64] * 4, lanes, lanes), code


@intrinsic(prefer_literal=True)
def load_columns(typing: Any, unit: Any, address: Any, num_columns: Any) -> Any:
    """16 rows of ``num_columns`` (a literal) values, as one vector per column."""
    count = num_columns.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = load_memory(builder, signature.args[0], arguments[1], LANES * count)
        columns = [
            builder.shuffle_vector(rows, rows, ir.Constant(VI32, list(range(column, LANES * count, count))))
            for column in range(count)
        ]
        return context.make_tuple(builder, signature.return_type, columns)

    return types.UniTuple(lanes, count)(unit, types.int64, num_columns), code


@intrinsic
def store_columns(typing: Any, unit: Any, address: Any, columns: Any) -> Any:
    """Write vectors as the columns of 16 rows; the opposite of ``load_columns``, for 3 columns."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, third = (builder.extract_value(arguments[2], index) for index in range(3))
        pair = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, 32), list(range(32))))
        padded = builder.shuffle_vector(third, third, ir.Constant(ir.VectorType(I32, 32), list(range(16)) * 2))
        order = [column * LANES + row for row in range(LANES) for column in range(3)]
        rows = builder.shuffle_vector(pair, padded, ir.Constant(ir.VectorType(I32, 48), order))
        store_memory(builder, signature.args[0], arguments[1], rows)
        return context.get_dummy_value()

    return types.void(unit, types.int64, columns), code
