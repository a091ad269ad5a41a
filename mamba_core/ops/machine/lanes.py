"""Sixteen fp32 numbers as one value inside of numba functions: a type, and what can be done with it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model, type_callable
from numba.extending import lower_builtin as lower

from mamba_core.ops.machine import instructions
from mamba_core.ops.machine.instructions import F32, I32, VF32, call, sums


class Lanes(types.Type):
    """The type of sixteen fp32 numbers."""

    def __init__(self) -> None:
        super().__init__("lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VF32)


def _of_lanes(emit: Callable[..., Any]) -> Any:
    """A numba function of lanes, to lanes, from what emits it."""

    def function(typing: Any, x: Any) -> Any:
        return lanes(lanes), lambda context, builder, signature, arguments: emit(builder, *arguments)

    function.__name__ = function.__qualname__ = emit.__name__
    return intrinsic(function)


exp2 = _of_lanes(instructions.exp2)
softplus = _of_lanes(instructions.softplus)
silu = _of_lanes(instructions.silu)
magnitude = _of_lanes(instructions.magnitude)


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of two in each lane, NaN if either is."""
    return lanes(lanes, lanes), lambda context, builder, signature, arguments: instructions.larger(builder, *arguments)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the machine has an instruction for that."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return instructions.fma(builder, *arguments)

    return lanes(lanes, lanes, lanes), code


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """The same number in all lanes."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return instructions.splat(builder, arguments[0])

    return lanes(types.float32), code


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum of all lanes, in pairs."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(sums(builder, [arguments[0]]), I32(0))

    return types.float32(lanes), code


@intrinsic
def largest(typing: Any, x: Any) -> Any:
    """The largest of all lanes, NaN if one is."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.vector.reduce.fmaximum.v16f32", F32, arguments[0])

    return types.float32(lanes), code


for _operator, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):

    @type_callable(_operator)
    def _type(context: Any) -> Any:
        return lambda a, b: lanes if isinstance(a, Lanes) and isinstance(b, Lanes) else None

    def _emit(context: Any, builder: Any, signature: Any, arguments: Any, name: str = _instruction) -> Any:
        return getattr(builder, name)(*arguments)

    lower(_operator, lanes, lanes)(_emit)
