"""Vectors of 16 floats inside of numba functions: a type, and what can be done with it, as LLVM instructions.

Memory is addressed by plain integers. ``unit`` is a number whose type alone counts: it says how values lie in memory
(see ``units``). All arithmetic is fp32 and NaN passes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VF32, VI32, VI16 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
ALL_LANES = ir.Constant(VI32, list(range(LANES)))


class BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)

    def _to_string(self) -> str:
        return "bfloat"


BF16 = BFloatType()
VBF16 = ir.VectorType(BF16, LANES)


class Vector(types.Type):
    """Numba's type of 16 fp32 values in a register."""

    def __init__(self) -> None:
        super().__init__(name="Vector16F")


VECTOR = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, VF32)


def is_float32(unit: Any) -> bool:
    """Whether values of this unit lie in memory as fp32; else they are bfloat16."""
    return unit == types.float32


def element(unit: Any) -> ir.Type:
    return F32 if is_float32(unit) else I16


def width(unit: Any) -> int:
    """Bytes of one value in memory."""
    return 4 if is_float32(unit) else int(unit.bitwidth) // 8


def constant(value: float) -> ir.Constant:
    return ir.Constant(VF32, [value] * LANES)


def splat(builder: ir.IRBuilder, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(VI32, [0] * LANES))


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call a function by its name, declared on first use."""
    declared = builder.module.globals.get(name)
    if declared is None:
        declared = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(declared, arguments)


def fused(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def pointer(builder: ir.IRBuilder, address: Any, pointee: ir.Type) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def widen(builder: ir.IRBuilder, bits: Any) -> Any:
    """bfloat16 as int16 bits -> fp32."""
    count = bits.type.count
    shift = ir.Constant(ir.VectorType(I32, count), [16] * count)
    return builder.bitcast(builder.shl(builder.zext(bits, shift.type), shift), ir.VectorType(F32, count))


def narrow(builder: ir.IRBuilder, values: Any) -> Any:
    """fp32 -> the bits of the nearest bfloat16, ties to even."""
    count = values.type.count
    rounded = builder.fptrunc(values, ir.VectorType(BF16, count))
    return builder.bitcast(rounded, ir.VectorType(I16, count))


def lanes_below(builder: ir.IRBuilder, count: Any, lanes: int = LANES) -> Any:
    """The mask of the first ``count`` (i64) lanes."""
    index = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    limit = builder.insert_element(ir.Constant(index.type, ir.Undefined), builder.trunc(count, I32), I32(0))
    limit = builder.shuffle_vector(limit, limit, ir.Constant(index.type, [0] * lanes))
    return builder.icmp_signed("<", index, limit)


def masked_load(builder: ir.IRBuilder, address: Any, mask: Any, of: ir.Type, bytes_each: int) -> Any:
    """Lanes outside of the mask are zero, and their memory is not touched."""
    kind = "f32" if of == F32 else f"i{of.width}"
    type_ = ir.VectorType(of, mask.type.count)
    where = pointer(builder, address, type_)
    zeros = ir.Constant(type_, None)
    name = f"llvm.masked.load.v{mask.type.count}{kind}.p0"
    return call(builder, name, type_, where, I32(bytes_each), mask, zeros)


def masked_store(builder: ir.IRBuilder, value: Any, address: Any, mask: Any, bytes_each: int) -> None:
    of = value.type.element
    kind = "f32" if of == F32 else f"i{of.width}"
    where = pointer(builder, address, value.type)
    name = f"llvm.masked.store.v{mask.type.count}{kind}.p0"
    call(builder, name, ir.VoidType(), value, where, I32(bytes_each), mask)


def load_memory(builder: ir.IRBuilder, unit: Any, address: Any, lanes: int = LANES) -> Any:
    raw = builder.load(pointer(builder, address, ir.VectorType(element(unit), lanes)), align=width(unit))
    return raw if is_float32(unit) else widen(builder, raw)


def store_memory(builder: ir.IRBuilder, unit: Any, address: Any, values: Any) -> None:
    raw = values if is_float32(unit) else narrow(builder, values)
    builder.store(raw, pointer(builder, address, raw.type), align=width(unit))


def halves_summed(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """The sums of neighbours in ``a`` followed by those in ``b``."""
    lanes = a.type.count
    even = ir.Constant(ir.VectorType(I32, lanes), list(range(0, 2 * lanes, 2)))
    odd = ir.Constant(even.type, list(range(1, 2 * lanes, 2)))
    return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))


def sums(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """The sum of each of 1, 2, 4, 8 or 16 vectors, as one vector with as many lanes."""
    count = len(vectors)
    while len(vectors) > 1:
        vectors = [halves_summed(builder, a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    total = vectors[0]
    while total.type.count > count:
        half = total.type.count // 2
        even = ir.Constant(ir.VectorType(I32, half), list(range(0, 2 * half, 2)))
        odd = ir.Constant(even.type, list(range(1, 2 * half, 2)))
        total = builder.fadd(builder.shuffle_vector(total, total, even), builder.shuffle_vector(total, total, odd))
    return total


# 2**r for r in [-1/2, 1/2], relative error below 1e-7: the Taylor series with its last terms bent to the interval
_EXP2 = (1.0, 0.6931471805599453, 0.24022650695910072, 0.055504108664821576, 0.009618129107628477, 0.00133335581464284)
_EXP2_LAST = 0.00015403530393381606
# adding this leaves, in the lowest bits, an integer plus the bias of an exponent
_ROUNDER = 12582912.0 + 127.0


def exp2(builder: ir.IRBuilder, x: Any) -> Any:
    """2**x, relative error below 3e-7; x is taken into [-126, 127]."""
    for bound, order in ((constant(-126.0), "<"), (constant(127.0), ">")):
        x = builder.select(builder.fcmp_ordered(order, x, bound), bound, x)
    shifted = builder.fadd(x, constant(_ROUNDER))
    rest = builder.fsub(x, builder.fsub(shifted, constant(_ROUNDER)))
    bits = builder.shl(builder.bitcast(shifted, VI32), ir.Constant(VI32, [23] * LANES))
    value = constant(_EXP2_LAST)
    for coefficient in reversed(_EXP2):
        value = fused(builder, value, rest, constant(coefficient))
    return builder.fmul(value, builder.bitcast(bits, VF32))


def _elementwise(emit: Callable[..., Any], arity: int) -> Any:
    """An intrinsic of ``arity`` vectors that returns one."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    if arity == 1:

        @intrinsic
        def unary(typing: Any, a: Any) -> Any:
            return VECTOR(VECTOR), code

        return unary
    if arity == 2:

        @intrinsic
        def binary(typing: Any, a: Any, b: Any) -> Any:
            return VECTOR(VECTOR, VECTOR), code

        return binary

    @intrinsic
    def ternary(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return VECTOR(VECTOR, VECTOR, VECTOR), code

    return ternary


_LOG2E = 1.4426950408889634


def _exp(builder: ir.IRBuilder, x: Any) -> Any:
    return exp2(builder, builder.fmul(x, constant(_LOG2E)))


def _silu(builder: ir.IRBuilder, x: Any) -> Any:
    grown = exp2(builder, builder.fmul(x, constant(-_LOG2E)))
    return builder.fdiv(x, builder.fadd(grown, constant(1.0)))


def _softplus(builder: ir.IRBuilder, x: Any) -> Any:
    """max(x, 0) + log(1 + exp(-|x|)); the logarithm is 2 atanh(e / (2 + e)), whose argument is at most 1/3."""
    zero = constant(0.0)
    is_negative = builder.fcmp_ordered("<", x, zero)
    away = builder.select(is_negative, x, builder.fneg(x))
    grown = _exp(builder, away)
    s = builder.fdiv(grown, builder.fadd(grown, constant(2.0)))
    square = builder.fmul(s, s)
    series = constant(2.0 / 15.0)
    for power in (13, 11, 9, 7, 5, 3, 1):
        series = fused(builder, series, square, constant(2.0 / power))
    return fused(builder, series, s, builder.select(is_negative, zero, x))


add = _elementwise(lambda builder, a, b: builder.fadd(a, b), 2)
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b), 2)
multiply_add = _elementwise(fused, 3)
exp = _elementwise(_exp, 1)
exp_2 = _elementwise(exp2, 1)
silu = _elementwise(_silu, 1)
softplus = _elementwise(_softplus, 1)


def _magnitude(builder: ir.IRBuilder, x: Any) -> Any:
    return call(builder, "llvm.fabs.v16f32", VF32, x)


def _larger(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """The larger of two, NaN if either is."""
    is_kept = builder.or_(builder.fcmp_ordered(">", a, b), builder.fcmp_unordered("uno", a, a))
    return builder.select(is_kept, a, b)


magnitude = _elementwise(_magnitude, 1)
larger = _elementwise(_larger, 2)


@intrinsic
def largest(typing: Any, vector: Any) -> Any:
    """The largest of all lanes, NaN if one is."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.vector.reduce.fmaximum.v16f32", F32, arguments[0])

    return types.float32(VECTOR), code


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

    return types.void(types.int64, VECTOR, types.int64), code


@intrinsic
def broadcast(typing: Any, value: Any) -> Any:
    """A float in all lanes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat(builder, arguments[0])

    return VECTOR(types.float32), code


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of all lanes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(sums(builder, [arguments[0]]), I32(0))

    return types.float32(VECTOR), code


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

    return VECTOR(unit, types.int64, types.int64), code


@intrinsic
def store(typing: Any, unit: Any, address: Any, vector: Any, count: Any) -> Any:
    """Write the first ``count`` of 16 values to an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of = signature.args[0]
        _, address, vector, count = arguments
        with builder.if_else(builder.icmp_signed(">=", count, I64(LANES))) as (whole, part):
            with whole:
                store_memory(builder, of, address, vector)
            with part:
                raw = vector if is_float32(of) else narrow(builder, vector)
                masked_store(builder, raw, address, lanes_below(builder, count), width(of))
        return context.get_dummy_value()

    return types.void(unit, types.int64, VECTOR, types.int64), code


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
            h = fused(builder, exp2(builder, builder.fmul(rate, a)), h, builder.fmul(gain, b))
            store_memory(builder, types.float32, where, h)
            products.append(builder.fmul(h, c))
        return sums(builder, products)

    return VECTOR(*[types.int64] * 4, VECTOR, VECTOR), code


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

    return types.UniTuple(VECTOR, count)(unit, types.int64, num_columns), code


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
