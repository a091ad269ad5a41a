"""Vectors of fp32 values as LLVM instructions, in whatever registers the machine has.

A loop over single numbers is left to LLVM's vectoriser, which gives up on an exponential; this leaves it no choice.
All arithmetic is fp32 and NaN passes through it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

LANES = 16

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VF32, VI32, VI16 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)

# exp2(f) for |f| <= 1/2: 1 + f * (...), relative error 9e-8, exact at 0 so that slow decays stay exact
_EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
# atanh(s) / s in s^2, |s| <= 1/3: relative error 5e-9
_ATANH = (1.0, 0.3333320915699005, 0.2001076340675354, 0.14000901579856873, 0.1400599628686905)
_LOG2E = 1.4426950408889634
# adding it leaves the nearest integer in the lowest bits
_ROUNDER = 12582912.0
_LEAST_EXPONENT, _GREATEST_EXPONENT = -126.0, 127.0


def vector(of: ir.Type, lanes: int, value: Any) -> ir.Constant:
    """The same constant in all lanes."""
    return ir.Constant(ir.VectorType(of, lanes), [value] * lanes)


def constant(value: float) -> ir.Constant:
    return vector(F32, LANES, value)


def splat(builder: ir.IRBuilder, value: Any, lanes: int = LANES) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, vector(I32, lanes, 0))


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call a function by its name, declared on first use."""
    declared = builder.module.globals.get(name)
    if declared is None:
        declared = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(declared, arguments)


def fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the machine has an instruction for that."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def magnitude(builder: ir.IRBuilder, x: Any) -> Any:
    return call(builder, "llvm.fabs.v16f32", VF32, x)


def larger(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """The larger of two, NaN if either is."""
    is_kept = builder.or_(builder.fcmp_ordered(">", a, b), builder.fcmp_unordered("uno", a, a))
    return builder.select(is_kept, a, b)


def at_least(builder: ir.IRBuilder, x: Any, bound: float) -> Any:
    """The greater of both; NaN stays NaN."""
    return builder.select(builder.fcmp_ordered("<", x, constant(bound)), constant(bound), x)


def at_most(builder: ir.IRBuilder, x: Any, bound: float) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, constant(bound)), constant(bound), x)


def polynomial(builder: ir.IRBuilder, x: Any, coefficients: tuple[float, ...]) -> Any:
    """The sum of coefficient[k] * x^k."""
    result = constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = fma(builder, result, x, constant(coefficient))
    return result


def exp2(builder: ir.IRBuilder, x: Any) -> Any:
    """2^x for x up to 127; 2^-126 where it would be less."""
    x = at_least(builder, x, _LEAST_EXPONENT)
    shifted = builder.fadd(x, constant(_ROUNDER))
    fraction = builder.fsub(x, builder.fsub(shifted, constant(_ROUNDER)))
    mantissa = polynomial(builder, fraction, _EXP2)
    exponent = builder.shl(builder.bitcast(shifted, VI32), vector(I32, LANES, 23))
    return builder.bitcast(builder.add(builder.bitcast(mantissa, VI32), exponent), VF32)


def softplus(builder: ir.IRBuilder, x: Any) -> Any:
    """max(x, 0) + log1p(exp(-|x|)), the logarithm as 2 atanh(u / (2 + u))."""
    u = exp2(builder, builder.fmul(magnitude(builder, x), constant(-_LOG2E)))
    s = builder.fdiv(u, builder.fadd(u, constant(2.0)))
    series = polynomial(builder, builder.fmul(s, s), _ATANH)
    return fma(builder, builder.fadd(s, s), series, at_least(builder, x, 0.0))


def silu(builder: ir.IRBuilder, x: Any) -> Any:
    power = at_most(builder, builder.fmul(x, constant(-_LOG2E)), _GREATEST_EXPONENT)
    return builder.fdiv(x, builder.fadd(exp2(builder, power), constant(1.0)))


def widen(builder: ir.IRBuilder, bits: Any) -> Any:
    """The bits of bfloat16 as int16 -> fp32."""
    count = bits.type.count
    upper = builder.shl(builder.zext(bits, ir.VectorType(I32, count)), vector(I32, count, 16))
    return builder.bitcast(upper, ir.VectorType(F32, count))


def narrow(builder: ir.IRBuilder, values: Any) -> Any:
    """fp32 -> the bits of the nearest bfloat16, ties to even; one NaN for all, which rounding could make infinite."""
    count = values.type.count

    def ints(value: int) -> ir.Constant:
        return vector(I32, count, value)

    bits = builder.bitcast(values, ints(0).type)
    tie = builder.and_(builder.lshr(bits, ints(16)), ints(1))
    rounded = builder.lshr(builder.add(builder.add(bits, tie), ints(0x7FFF)), ints(16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    return builder.trunc(builder.select(is_nan, ints(0x7FC0), rounded), ir.VectorType(I16, count))


def lanes_below(builder: ir.IRBuilder, count: Any, lanes: int = LANES) -> Any:
    """The mask of the first ``count`` (i64) lanes."""
    index = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", index, splat(builder, builder.trunc(count, I32), lanes))


def _neighbours_summed(builder: ir.IRBuilder, a: Any, b: Any, lanes: int) -> Any:
    """The first ``lanes`` sums of neighbours in ``a`` followed by those in ``b``."""
    even, odd = (ir.Constant(ir.VectorType(I32, lanes), list(range(first, 2 * lanes, 2))) for first in (0, 1))
    return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))


def sums(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """The sum of each of 1, 2, 4, 8 or 16 vectors, as one vector with as many lanes."""
    count = len(vectors)
    while len(vectors) > 1:
        vectors = [
            _neighbours_summed(builder, a, b, a.type.count) for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    result = vectors[0]
    while result.type.count > count:
        result = _neighbours_summed(builder, result, result, result.type.count // 2)
    return result
