"""Compile the sampler's kernels for a Hopper GPU, as a program of its own: prints one line of JSON per kernel.

Triton decides at import whether it interprets or compiles, so tests, which interpret, run this in another process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from app.engine import fused_sampler_kernels

TARGET = GPUTarget("cuda", 90, 32)
BLOCK = 1024
# a vocabulary that is searched over the row first, one that a tile holds, one of a single block
SHAPES = [{"V": 50280, "ALIGN": 8}, {"V": 4000, "ALIGN": 16}, {"V": 97, "ALIGN": 1}]
POINTERS = {"slots": "*i64", "table": "*i64", "maxima": "*fp32", "indices": "*i32", "sums": "*fp64"} | {
    "tokens": "*i64",
    "is_finite": "*u8",
    "scratch": "*fp32",
}


def variants() -> Iterator[tuple[str, dict[str, Any], int]]:
    """Kernel, constants, warps."""
    for shape in SHAPES:
        blocks = triton.cdiv(shape["V"], BLOCK)
        constants = shape | {"BLOCK": BLOCK}
        yield "sampler_block_kernel", constants, 2
        constants |= {"NUM_BLOCKS": blocks, "BLOCKS": triton.next_power_of_2(blocks)}
        yield "sampler_row_kernel", constants | {"CHUNK": 2048, "CANDIDATES": 4096, "GROUP": 4}, 8


def source_of(kernel: Any, constants: dict[str, Any], logits: str) -> ASTSource:
    """The kernel for logits of this type, all pointers divisible by 16."""
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(index,)] = constants[name]
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name.removesuffix("_ptr"), logits)
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)


def compile_all() -> Iterator[dict[str, Any]]:
    for name, constants, num_warps in variants():
        kernel = getattr(fused_sampler_kernels, name)
        for logits in ("*fp32", "*bf16"):
            compiled = triton.compile(
                source_of(kernel, constants, logits), target=TARGET, options={"num_warps": num_warps, "maxnreg": 128}
            )
            assembly = compiled.asm["ptx"]
            yield {
                "kernel": name,
                "logits": logits,
                "align": constants["ALIGN"],
                "type": type(kernel).__name__,
                "cubin_bytes": len(compiled.asm["cubin"]),
                "wide_loads": assembly.count(".v4.b32"),
                "specialised": [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)],
            }


if __name__ == "__main__":
    for line in compile_all():
        print(json.dumps(line), flush=True)  # noqa: T201  the output is the result
