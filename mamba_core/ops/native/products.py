"""Matrix products of few rows: dot products along the rows of a weight as it lies in memory.

A tile holds one vector of partial sums for each of its outputs and adds them up at its end. Weights lie as torch
keeps them, [outputs, inputs]; they are not copied.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mamba_core.ops.machine.compiling import compiled
from mamba_core.ops.machine.instructions import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VF32,
    VI32,
    call,
    fma,
    lanes_below,
    sums,
    widen,
)
from mamba_core.ops.machine.memory import bytes_of, is_float32, masked_load, pointer, prefetch_memory


class BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)

    def _to_string(self) -> str:
        return "bfloat"


PAIRS = 2 * LANES


class _Multiplier:
    """How one step along the inputs is multiplied, for weights and inputs of one kind."""

    def __init__(self, unit: Any) -> None:
        self.is_float32 = is_float32(unit)
        self.is_int8 = unit in (types.int8, types.uint8)
        # bfloat16 by bfloat16, or int8 by int16
        self.is_paired = unit in (types.uint16, types.int8)
        self.lanes = PAIRS if self.is_paired else LANES
        self.weight_element = F32 if self.is_float32 else I8 if self.is_int8 else I16
        self.weight_bytes = 4 if self.is_float32 else 1 if self.is_int8 else 2
        self.input_element = I16 if self.is_paired else F32
        self.input_bytes = 2 if self.is_paired else 4
        self.sums_integers = self.is_paired and self.is_int8

    @property
    def total(self) -> ir.Type:
        return VI32 if self.sums_integers else VF32

    def load_inputs(self, builder: ir.IRBuilder, address: Any) -> Any:
        type_ = ir.VectorType(self.input_element, self.lanes)
        return builder.load(pointer(builder, address, type_), align=self.input_bytes)

    def load_weights(self, builder: ir.IRBuilder, address: Any, count: Any = None) -> Any:
        if count is None:
            type_ = ir.VectorType(self.weight_element, self.lanes)
            raw = builder.load(pointer(builder, address, type_), align=self.weight_bytes)
        else:
            mask = lanes_below(builder, count, self.lanes)
            raw = masked_load(builder, address, mask, self.weight_element, self.weight_bytes)
        if self.sums_integers:
            return builder.sext(raw, ir.VectorType(I16, PAIRS))
        if self.is_int8:
            return builder.sitofp(builder.sext(raw, VI32), VF32)
        return raw if self.is_float32 or self.is_paired else widen(builder, raw)

    def accumulate(self, builder: ir.IRBuilder, total: Any, inputs: Any, weights: Any) -> Any:
        if self.sums_integers:
            return builder.add(total, call(builder, "llvm.x86.avx512.pmaddw.d.512", VI32, inputs, weights))
        if not self.is_paired:
            return fma(builder, inputs, weights, total)
        pairs = ir.VectorType(BFloatType(), PAIRS)
        a, b = builder.bitcast(inputs, pairs), builder.bitcast(weights, pairs)
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VF32, total, a, b)

    def finish(self, builder: ir.IRBuilder, total: Any) -> Any:
        return builder.sitofp(total, VF32) if self.sums_integers else total


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing: Any,
    unit: Any,
    num_rows: Any,
    num_outputs: Any,
    inputs: Any,
    input_stride: Any,
    weights: Any,
    length: Any,
    results: Any,
    result_stride: Any,
    ahead: Any,
) -> Any:
    """A tile of ``num_rows`` x ``num_outputs`` (literals) dot products of ``length``, written as fp32.

    inputs, weights, results: addresses of the tile's first row, first output, first result; strides in bytes; weights
    are dense. Inputs are padded with zeros to a multiple of 32. ``ahead``: bytes by which weights are fetched early.
    """
    tile = num_rows.literal_value, num_outputs.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_tile(builder, _Multiplier(signature.args[0]), tile, arguments[3:])
        return context.get_dummy_value()

    integers = [types.int64] * 7
    return types.void(unit, num_rows, num_outputs, *integers), code


def _emit_tile(builder: ir.IRBuilder, kind: _Multiplier, tile: tuple[int, int], arguments: Any) -> None:
    num_rows, num_outputs = tile
    inputs, input_stride, weights, length, results, result_stride, ahead = arguments
    rows = [builder.add(inputs, builder.mul(input_stride, I64(row))) for row in range(num_rows)]
    weight_stride = builder.mul(length, I64(kind.weight_bytes))
    outputs = [builder.add(weights, builder.mul(weight_stride, I64(output))) for output in range(num_outputs)]
    zeros = ir.Constant(kind.total, None)
    totals = [cgutils.alloca_once(builder, kind.total) for _ in range(num_rows * num_outputs)]
    for total in totals:
        builder.store(zeros, total)

    def step(index: Any, count: Any = None) -> None:
        x_offset = builder.mul(index, I64(kind.lanes * kind.input_bytes))
        w_offset = builder.mul(index, I64(kind.lanes * kind.weight_bytes))
        loaded = []
        for output in outputs:
            address = builder.add(output, w_offset)
            if count is None:
                prefetch_memory(builder, builder.add(address, ahead))
            loaded.append(kind.load_weights(builder, address, count))
        for row, address in enumerate(rows):
            x = kind.load_inputs(builder, builder.add(address, x_offset))
            for output, w in enumerate(loaded):
                total = totals[row * num_outputs + output]
                builder.store(kind.accumulate(builder, builder.load(total), x, w), total)

    whole = builder.udiv(length, I64(kind.lanes))
    with cgutils.for_range(builder, whole) as loop:
        step(loop.index)
    rest = builder.urem(length, I64(kind.lanes))
    with builder.if_then(builder.icmp_unsigned(">", rest, I64(0)), likely=False):
        step(whole, rest)

    flat = sums(builder, [kind.finish(builder, builder.load(total)) for total in totals])
    for row in range(num_rows):
        lanes = ir.Constant(ir.VectorType(I32, num_outputs), [row * num_outputs + o for o in range(num_outputs)])
        part = builder.shuffle_vector(flat, flat, lanes)
        address = builder.add(results, builder.mul(result_stride, I64(row)))
        builder.store(part, pointer(builder, address, part.type), align=4)


@compiled
def multiply(
    unit: Any,
    inputs: int,
    input_stride: int,
    num_rows: int,
    weights: int,
    length: int,
    results: int,
    result_stride: int,
    first: int,
    end: int,
) -> None:
    """results[row, o] = inputs[row] . weights[o] for outputs ``first`` to ``end`` of a weight [outputs, length]."""
    weight_bytes = length * bytes_of(unit)
    output = first
    while output < end:
        w = weights + output * weight_bytes
        x, y = inputs, results + 4 * output
        left = num_rows
        if end - output >= 4:
            # the next outputs are on their way while these are multiplied
            ahead = 4 * weight_bytes
            while left >= 4:
                multiply_tile(unit, 4, 4, x, input_stride, w, length, y, result_stride, ahead)
                x, y, left = x + 4 * input_stride, y + 4 * result_stride, left - 4
            if left >= 2:
                multiply_tile(unit, 2, 4, x, input_stride, w, length, y, result_stride, ahead)
                x, y, left = x + 2 * input_stride, y + 2 * result_stride, left - 2
            if left >= 1:
                multiply_tile(unit, 1, 4, x, input_stride, w, length, y, result_stride, ahead)
            output += 4
        else:
            while left >= 1:
                multiply_tile(unit, 1, 1, x, input_stride, w, length, y, result_stride, 0)
                x, y, left = x + input_stride, y + result_stride, left - 1
            output += 1
