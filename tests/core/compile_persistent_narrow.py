"""Compile the persistent step of a narrow model for a Hopper GPU, as ``compile_kernels`` does for those of the ops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.persistent_narrow import sizes_for
from mamba_core.ops.triton.persistent_narrow_kernel import persistent_narrow_kernel
from mamba_core.ops.triton.persistent_step import WARPS
from tests.compiling import compiled_for_hopper, persistent_facts, print_records, source_of

# rows, H, R, K and what else a model may have: published sizes, and one of everything else
SIZES: list[tuple[int, int, int, int, dict[str, Any]]] = [
    (64, 768, 48, 4, {}),
    (32, 768, 48, 4, {}),
    (64, 1024, 64, 4, {}),
    (20, 512, 16, 3, {"HAS_CONV_BIAS": False, "TAP_MAJOR": False, "SKIP_DTYPE": gl.bfloat16}),
]
TYPES = {
    **dict.fromkeys(("table_ptr", "tokens_ptr", "slots_ptr"), "*i64"),
    **dict.fromkeys(("low_ptr", "squares_ptr", "ssm_ptr"), "*fp32"),
    "counter_ptr": "*i32",
}
UNALIGNED = frozenset({"rows", "layers"})


def compile_all() -> Iterator[dict[str, Any]]:
    for rows, width, rank, taps, changes in SIZES:
        constants = {"SIZES": sizes_for(rows, width, rank, taps)._replace(**changes)}
        source = source_of(persistent_narrow_kernel, constants, TYPES, unaligned=UNALIGNED)
        compiled = compiled_for_hopper(source, num_warps=WARPS)
        assembly = compiled.asm["ptx"]
        yield {
            "rows": rows,
            "width": width,
            **persistent_facts(compiled),
            "wide_reads": len(re.findall(r"ld\.global\.v4\.b32", assembly)),
            "wide_inputs": len(re.findall(r"ld\.global\.cg\.v4\.b32", assembly)),
            "wide_writes": len(re.findall(r"st\.global\.v4\.b32", assembly)),
            "products": sorted(set(re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k16)", assembly))),
            "split_products": assembly.count("mma.sync.aligned.m16n8k16"),
        }


if __name__ == "__main__":
    print_records(compile_all())
