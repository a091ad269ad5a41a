"""Compile the sampler's kernels for a Hopper GPU, as a program of its own: prints one line of JSON per kernel.

Triton decides at import whether it interprets or compiles, so tests, which interpret, run this in another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton

from app.engine import fused_sampler_kernels
from tests.compiling import compiled_for_hopper, print_records, source_of

BLOCK = 1024
# a vocabulary that is searched over the row first, one that a tile holds, one of a single block
SHAPES = [{"V": 50280, "ALIGN": 8}, {"V": 4000, "ALIGN": 16}, {"V": 97, "ALIGN": 1}]
TYPES = {
    **dict.fromkeys(("slots_ptr", "table_ptr", "tokens_ptr"), "*i64"),
    **dict.fromkeys(("maxima_ptr", "scratch_ptr"), "*fp32"),
    "indices_ptr": "*i32",
    "sums_ptr": "*fp64",
}
# the row stride, in units of its alignment
UNALIGNED = frozenset({"row_units"})


def variants() -> Iterator[tuple[str, dict[str, Any], int]]:
    """Kernel, constants, warps."""
    for shape in SHAPES:
        blocks = triton.cdiv(shape["V"], BLOCK)
        constants = shape | {"BLOCK": BLOCK}
        yield "sampler_block_kernel", constants, 2
        constants |= {"NUM_BLOCKS": blocks, "BLOCKS": triton.next_power_of_2(blocks)}
        yield "sampler_row_kernel", constants | {"CHUNK": 2048, "CANDIDATES": 4096, "GROUP": 4, "BROKEN": -1}, 8


def compile_all() -> Iterator[dict[str, Any]]:
    for name, constants, num_warps in variants():
        kernel = getattr(fused_sampler_kernels, name)
        for logits in ("*fp32", "*bf16"):
            source = source_of(kernel, constants, TYPES | {"logits_ptr": logits}, unaligned=UNALIGNED)
            compiled = compiled_for_hopper(source, num_warps=num_warps, maxnreg=128)
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
    print_records(compile_all())
