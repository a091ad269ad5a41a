"""Compile the persistent step of several rows for a Hopper GPU, as ``compile_kernels`` does for those of the ops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.persistent_rows import sizes_for
from mamba_core.ops.triton.persistent_rows_kernel import persistent_rows_kernel
from tests.compiling import compiled_for_hopper, persistent_facts, print_records, source_of

PROGRAMS = 132
# one of everything that published models have not
ODD = {"HAS_BIAS": True, "HAS_CONV_BIAS": False, "TAP_MAJOR": False, "NORM": True, "SKIP_DTYPE": gl.bfloat16}
# rows, H, R, N, K and what else a model may have: published sizes, and another
SIZES: list[tuple[int, int, int, int, int, dict[str, Any]]] = [
    (8, 1024, 64, 16, 4, {}),
    (8, 2048, 128, 16, 4, {}),
    (8, 2560, 160, 16, 4, {}),
    (16, 2560, 160, 16, 4, {}),
    (16, 4096, 256, 16, 4, {"NORM": True}),
    (
        5,
        512,
        40,
        12,
        3,
        ODD,
    ),
    (8, 768, 48, 16, 4, {}),
    (32, 768, 48, 16, 4, {}),
]
TYPES = {
    **dict.fromkeys(("table_ptr", "tokens_ptr", "slots_ptr"), "*i64"),
    **dict.fromkeys(("shares_ptr", "low_ptr", "squares_ptr", "ssm_ptr"), "*fp32"),
    "counter_ptr": "*i32",
    "inner_eps": "fp32",
}
UNALIGNED = frozenset({"rows", "layers", "inner_eps"})


def compile_all() -> Iterator[dict[str, Any]]:
    for rows, width, rank, states, taps, changes in SIZES:
        sizes = sizes_for(rows, width, rank, states, taps, PROGRAMS)._replace(**changes)
        source = source_of(persistent_rows_kernel, {"SIZES": sizes}, TYPES, unaligned=UNALIGNED)
        compiled = compiled_for_hopper(source, num_warps=sizes.WARPS)
        assembly = compiled.asm["ptx"]
        # of a thread: pieces of 16 bytes that its warp multiplies at once, of each tile of 16 rows
        yield {
            "space": sizes.BLOCK_B,
            "rows": rows,
            "width": width,
            **persistent_facts(compiled),
            "wide_reads": len(re.findall(r"ld\.shared\.v4", assembly)),
            "narrow_inputs": len(re.findall(r"ld\.global\.cg(?:\.b16|\.v2\.b32)", assembly)),
            "products": assembly.count("mma.sync.aligned.m16n8k16"),
        }


if __name__ == "__main__":
    print_records(compile_all())
