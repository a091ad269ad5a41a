"""Sixteen fp32 numbers as one value inside numba functions: a vector of LLVM's, in whatever registers the machine has.

A loop over single numbers is left to LLVM's vectoriser, which gives up on an exponential; this leaves it no choice.
Numbers in memory are fp32 or bf16, told apart by their size in bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model, type_callable
from numba.extending import lower_builtin as lower

WIDTH = 16
# exp2(f) for |f| <= 1/2: 1 + f * (...), relative error 9e-8, exact at 0 so that slow decays stay exact
_EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
# atanh(s) / s in s^2, |s| <= 1/3: relative error 5e-9
_ATANH = (1.0, 0.3333320915699005, 0.2001076340675354, 0.14000901579856873, 0.1400599628686905)
_LOG2_E = 1.4426950408889634
# adding it leaves the nearest integer in the lowest bits
_ROUNDER = 12582912.0
_LEAST_EXPONENT, _GREATEST_EXPONENT = -126.0, 127.0

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)
_BITS = ir.VectorType(ir.IntType(1), WIDTH)


class Lanes(types.Type):
    """The type of sixteen fp32 numbers."""

    def __init__(self) -> None:
        super().__init__("lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _all(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * WIDTH)


def _all_ints(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * WIDTH)


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    kind = ir.VectorType(value.type, WIDTH)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * WIDTH))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _FLOATS, a, b, c)


def _polynomial(builder: ir.IRBuilder, x: Any, coefficients: tuple[float, ...]) -> Any:
    """The sum of coefficient[k] * x^k."""
    result = _all(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = _fma(builder, result, x, _all(coefficient))
    return result


def _at_least(builder: ir.IRBuilder, x: Any, bound: float) -> Any:
    """The greater of both; NaN stays NaN."""
    return builder.select(builder.fcmp_ordered("<", x, _all(bound)), _all(bound), x)


def _at_most(builder: ir.IRBuilder, x: Any, bound: float) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, _all(bound)), _all(bound), x)


def _exp2(builder: ir.IRBuilder, x: Any) -> Any:
    """2^x for x up to 127; 2^-126 where it would be less."""
    x = _at_least(builder, x, _LEAST_EXPONENT)
    shifted = builder.fadd(x, _all(_ROUNDER))
    fraction = builder.fsub(x, builder.fsub(shifted, _all(_ROUNDER)))
    mantissa = _polynomial(builder, fraction, (1.0, *_EXP2))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _all_ints(_INTS, 23))
    return builder.bitcast(builder.add(builder.bitcast(mantissa, _INTS), exponent), _FLOATS)


def _softplus(builder: ir.IRBuilder, x: Any) -> Any:
    """max(x, 0) + log1p(exp(-|x|)), the logarithm as 2 atanh(u / (2 + u))."""
    magnitude = _call(builder, "llvm.fabs.v16f32", _FLOATS, x)
    u = _exp2(builder, builder.fmul(magnitude, _all(-_LOG2_E)))
    s = builder.fdiv(u, builder.fadd(u, _all(2.0)))
    series = _polynomial(builder, builder.fmul(s, s), _ATANH)
    return _fma(builder, builder.fadd(s, s), series, _at_least(builder, x, 0.0))


def _silu(builder: ir.IRBuilder, x: Any) -> Any:
    power = _at_most(builder, builder.fmul(x, _all(-_LOG2_E)), _GREATEST_EXPONENT)
    return builder.fdiv(x, builder.fadd(_exp2(builder, power), _all(1.0)))


def _of_lanes(emit: Callable[..., Any]) -> Any:
    """A numba function of lanes, to lanes, from what emits it."""

    def function(typingctx: Any, x: Any) -> Any:
        return lanes(lanes), lambda context, builder, signature, arguments: emit(builder, *arguments)

    function.__name__ = function.__qualname__ = emit.__name__.strip("_")
    return intrinsic(function)


exp2 = _of_lanes(_exp2)
softplus = _of_lanes(_softplus)
silu = _of_lanes(_silu)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return lanes(lanes, lanes, lanes), lambda context, builder, signature, arguments: _fma(builder, *arguments)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """The same number in all lanes."""
    return lanes(types.float32), lambda context, builder, signature, arguments: _splat(builder, arguments[0])


@intrinsic
def total(typingctx: Any, x: Any) -> Any:
    """The sum of all lanes, in pairs."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        value, width = arguments[0], WIDTH
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), width), list(part)))
                for part in (range(width), range(width, 2 * width))
            ]
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(lanes), emit


def _pointer(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _first(builder: ir.IRBuilder, count: Any) -> Any:
    """A mask of the first ``count`` lanes."""
    numbers = ir.Constant(_INTS, list(range(WIDTH)))
    return builder.icmp_signed("<", numbers, _splat(builder, builder.trunc(count, ir.IntType(32))))


def _loader(kind: ir.VectorType, itemsize: int, name: str, widen: Callable[..., Any]) -> tuple[Any, Any]:
    """Functions that load all lanes from an address, and the first few, the others zero."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return widen(builder, builder.load(_pointer(builder, arguments[0], kind), align=itemsize))

    def emit_first(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], kind)
        alignment = ir.Constant(ir.IntType(32), itemsize)
        mask, zeros = _first(builder, arguments[1]), ir.Constant(kind, [0] * WIDTH)
        return widen(builder, _call(builder, f"llvm.masked.load.{name}.p0", kind, pointer, alignment, mask, zeros))

    def load(typingctx: Any, address: Any) -> Any:
        return lanes(types.int64), emit

    def load_first(typingctx: Any, address: Any, count: Any) -> Any:
        return lanes(types.int64, types.int64), emit_first

    return intrinsic(load), intrinsic(load_first)


def _storer(kind: ir.VectorType, itemsize: int, name: str, narrow: Callable[..., Any]) -> tuple[Any, Any]:
    """Functions that store all lanes at an address, and the first few."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], kind)
        builder.store(narrow(builder, arguments[1]), pointer, align=itemsize)
        return context.get_dummy_value()

    def emit_first(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], kind)
        alignment = ir.Constant(ir.IntType(32), itemsize)
        mask, values = _first(builder, arguments[2]), narrow(builder, arguments[1])
        _call(builder, f"llvm.masked.store.{name}.p0", ir.VoidType(), values, pointer, alignment, mask)
        return context.get_dummy_value()

    def store(typingctx: Any, address: Any, x: Any) -> Any:
        return types.void(types.int64, lanes), emit

    def store_first(typingctx: Any, address: Any, x: Any, count: Any) -> Any:
        return types.void(types.int64, lanes, types.int64), emit_first

    return intrinsic(store), intrinsic(store_first)


def _same(builder: ir.IRBuilder, value: Any) -> Any:
    return value


def _from_bfloat16(builder: ir.IRBuilder, halves: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _all_ints(_INTS, 16)), _FLOATS)


def _to_bfloat16(builder: ir.IRBuilder, x: Any) -> Any:
    """Rounded to the nearest, ties to even; one NaN for all, which rounding could carry into infinity."""
    bits = builder.bitcast(x, _INTS)
    tie = builder.and_(builder.lshr(bits, _all_ints(_INTS, 16)), _all_ints(_INTS, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, tie), _all_ints(_INTS, 0x7FFF)), _all_ints(_INTS, 16))
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.trunc(builder.select(is_nan, _all_ints(_INTS, 0x7FC0), rounded), _HALVES)


load_lanes, _load_first_lanes = _loader(_FLOATS, 4, "v16f32", _same)
_load_halves, _load_first_halves = _loader(_HALVES, 2, "v16i16", _from_bfloat16)
store_lanes, _store_first_lanes = _storer(_FLOATS, 4, "v16f32", _same)
_store_halves, _store_first_halves = _storer(_HALVES, 2, "v16i16", _to_bfloat16)


def _number_loader(kind: ir.Type, result: Any) -> Any:
    """A function that loads one number from an address."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        value = builder.load(_pointer(builder, arguments[0], kind))
        if result == types.int64:
            return builder.sext(value, ir.IntType(64))
        if kind == ir.FloatType():
            return value
        bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    def load(typingctx: Any, address: Any) -> Any:
        return result(types.int64), emit

    return intrinsic(load)


load_float = _number_loader(ir.FloatType(), types.float32)
_load_half = _number_loader(ir.IntType(16), types.float32)
load_int32 = _number_loader(ir.IntType(32), types.int64)
load_int64 = _number_loader(ir.IntType(64), types.int64)


@intrinsic
def store_float(typingctx: Any, address: Any, value: Any) -> Any:
    """One fp32 number to an address."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], _pointer(builder, arguments[0], ir.FloatType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), emit


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line of an address, which need not be a valid one."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], ir.IntType(8))
        numbers = [ir.Constant(ir.IntType(32), value) for value in (0, 3, 1)]
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *numbers)
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, as seen by all threads; returns what was there."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), emit


@njit(forceinline=True)
def load_number(address: int, itemsize: int) -> Any:
    """One number from an address."""
    if itemsize == 4:
        return load_float(address)
    return _load_half(address)


@njit(forceinline=True)
def store_number(address: int, value: Any, itemsize: int) -> None:
    """One number to an address."""
    if itemsize == 4:
        store_float(address, value)
    else:
        _store_first_halves(address, splat(value), 1)


@njit(forceinline=True)
def load(address: int, itemsize: int, count: int) -> Any:
    """Up to sixteen numbers from an address, zeros beyond ``count``."""
    if itemsize == 4:
        if count >= WIDTH:
            return load_lanes(address)
        return _load_first_lanes(address, count)
    if count >= WIDTH:
        return _load_halves(address)
    return _load_first_halves(address, count)


@njit(forceinline=True)
def store(address: int, x: Any, itemsize: int, count: int) -> None:
    """The first ``count`` of sixteen numbers to an address."""
    if itemsize == 4:
        if count >= WIDTH:
            store_lanes(address, x)
        else:
            _store_first_lanes(address, x, count)
    elif count >= WIDTH:
        _store_halves(address, x)
    else:
        _store_first_halves(address, x, count)


for _operator, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):

    @type_callable(_operator)
    def _type(context: Any) -> Any:
        return lambda a, b: lanes if isinstance(a, Lanes) and isinstance(b, Lanes) else None

    def _emit(context: Any, builder: Any, signature: Any, arguments: Any, name: str = _instruction) -> Any:
        return getattr(builder, name)(*arguments)

    lower(_operator, lanes, lanes)(_emit)
