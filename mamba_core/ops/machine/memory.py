"""Loads and stores inside of numba functions.

Memory is addressed by plain integers. ``unit`` is a number whose type alone counts: float32 is fp32 in memory, int16
and uint16 are bfloat16, which becomes fp32 on its way.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mamba_core.ops.machine.instructions import F32, I8, I16, I32, I64, LANES, VF32, call, lanes_below, narrow, widen
from mamba_core.ops.machine.lanes import lanes


def is_float32(unit: Any) -> bool:
    """Whether values of this unit lie in memory as fp32; else they are bfloat16."""
    return unit == types.float32


def element(unit: Any) -> ir.Type:
    return F32 if is_float32(unit) else I16


def width(unit: Any) -> int:
    """Bytes of one value in memory."""
    return 4 if is_float32(unit) else int(unit.bitwidth) // 8


def pointer(builder: ir.IRBuilder, address: Any, pointee: ir.Type) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def _lane_name(of: ir.Type) -> str:
    return "f32" if of == F32 else f"i{of.width}"


def masked_load(builder: ir.IRBuilder, address: Any, mask: Any, of: ir.Type, bytes_each: int) -> Any:
    """Lanes outside of the mask are zero, and their memory is not touched."""
    kind = ir.VectorType(of, mask.type.count)
    where, zeros = pointer(builder, address, kind), ir.Constant(kind, None)
    name = f"llvm.masked.load.v{kind.count}{_lane_name(of)}.p0"
    return call(builder, name, kind, where, I32(bytes_each), mask, zeros)


def masked_store(builder: ir.IRBuilder, value: Any, address: Any, mask: Any, bytes_each: int) -> None:
    where = pointer(builder, address, value.type)
    name = f"llvm.masked.store.v{value.type.count}{_lane_name(value.type.element)}.p0"
    call(builder, name, ir.VoidType(), value, where, I32(bytes_each), mask)


def load_memory(builder: ir.IRBuilder, unit: Any, address: Any, count: int = LANES) -> Any:
    raw = builder.load(pointer(builder, address, ir.VectorType(element(unit), count)), align=width(unit))
    return raw if is_float32(unit) else widen(builder, raw)


def store_memory(builder: ir.IRBuilder, unit: Any, address: Any, values: Any) -> None:
    raw = values if is_float32(unit) else narrow(builder, values)
    builder.store(raw, pointer(builder, address, raw.type), align=width(unit))


def prefetch_memory(builder: ir.IRBuilder, address: Any) -> None:
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, I8), I32(0), I32(3), I32(1))


@intrinsic
def load(typing: Any, unit: Any, address: Any, count: Any) -> Any:
    """The first ``count`` of 16 values at an address, zeros behind them."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of, bytes_each = signature.args[0], width(signature.args[0])
        _, address, count = arguments
        with builder.if_else(builder.icmp_signed(">=", count, I64(LANES))) as (whole, part):
            with whole:
                full = load_memory(builder, of, address)
                full_block = builder.block
            with part:
                some = masked_load(builder, address, lanes_below(builder, count), element(of), bytes_each)
                some = some if is_float32(of) else widen(builder, some)
                some_block = builder.block
        result = builder.phi(VF32)
        result.add_incoming(full, full_block)
        result.add_incoming(some, some_block)
        return result

    return lanes(unit, types.int64, types.int64), code


@intrinsic
def store(typing: Any, unit: Any, address: Any, values: Any, count: Any) -> Any:
    """Write the first ``count`` of 16 values to an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of = signature.args[0]
        _, address, values, count = arguments
        with builder.if_else(builder.icmp_signed(">=", count, I64(LANES))) as (whole, part):
            with whole:
                store_memory(builder, of, address, values)
            with part:
                raw = values if is_float32(of) else narrow(builder, values)
                masked_store(builder, raw, address, lanes_below(builder, count), width(of))
        return context.get_dummy_value()

    return types.void(unit, types.int64, lanes, types.int64), code


@intrinsic
def load_scalar(typing: Any, unit: Any, address: Any) -> Any:
    """One value, as fp32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = load_memory(builder, signature.args[0], arguments[1], 1)
        return builder.extract_element(values, I32(0))

    return types.float32(unit, types.int64), code


@intrinsic
def store_scalar(typing: Any, unit: Any, address: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = builder.insert_element(ir.Constant(ir.VectorType(F32, 1), ir.Undefined), arguments[2], I32(0))
        store_memory(builder, signature.args[0], arguments[1], one)
        return context.get_dummy_value()

    return types.void(unit, types.int64, types.float32), code


@intrinsic
def word(typing: Any, address: Any, index: Any) -> Any:
    """Element ``index`` of the int64 values at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = builder.add(arguments[0], builder.mul(arguments[1], I64(8)))
        return builder.load(pointer(builder, where, I64))

    return types.int64(types.int64, types.int64), code


@intrinsic
def bytes_of(typing: Any, unit: Any) -> Any:
    """Bytes of one value of a unit."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return I64(width(signature.args[0]))

    return types.int64(unit), code


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line of an address, which need not be a valid one."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch_memory(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, as seen by all threads, and with all that was written before; what was there."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, arguments[0], I64), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), code
