"""Compile every kernel of the ops for a Hopper GPU, as a program of its own: prints one line of JSON per kernel.

Triton decides at import whether it interprets or compiles, so tests, which interpret, run this in another process. No
GPU is needed: the target is named, and the assembler is part of Triton.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from tests.compiling import compiled_for_hopper, print_records, source_of

NUM_STATES, WIDTH = 16, 4
SCAN = {"N": NUM_STATES, "BLOCK_N": 16, "ALIGN": 8}
CONV = {"K": WIDTH, "HAS_BIAS": True, "BLOCK_D": 128}
CONV_STEP = CONV | {"BLOCK_K": 4, "BLOCK_B": 4, "BLOCK_D": 256}
TILES = {"N": NUM_STATES, "ALIGN": 16, "CHECKPOINT": 16}
WIDE = {"GROUPS": 4, "STATES": 4, "WARPS": 4, "TILE": 16}
NORM = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "ROWS": 4, "BLOCK_H": 512}

# module, kernel, constants, warps
KERNELS: list[tuple[str, str, dict[str, Any], int]] = [
    ("scan_kernels", "scan_kernel", SCAN | {"BLOCK_D": 64, "CHECKPOINT": 0, "SEGMENTED": False}, 2),
    ("scan_kernels", "scan_kernel", SCAN | {"BLOCK_D": 64, "CHECKPOINT": 16, "SEGMENTED": True}, 2),
    ("scan_kernels", "scan_segment_kernel", SCAN | {"BLOCK_D": 64}, 2),
    ("scan_kernels", "scan_carry_kernel", {"N": NUM_STATES, "BLOCK": 128}, 4),
    ("scan_tile_kernels", "scan_tile_kernel", TILES | WIDE | {"WORK": 0}, 4),
    ("scan_tile_kernels", "scan_tile_kernel", TILES | {"GROUPS": 8, "STATES": 2, "WARPS": 4, "TILE": 32, "WORK": 1}, 4),
    ("scan_tile_kernels", "scan_tile_kernel", TILES | WIDE | {"WORK": 2}, 4),
    ("scan_kernels", "scan_step_kernel", {"N": NUM_STATES, "BLOCK_N": 16, "BLOCK_D": 64}, 4),
    ("scan_backward_kernels", "scan_backward_kernel", SCAN | {"BLOCK_D": 32, "CHECKPOINT": 16}, 1),
    ("conv_kernels", "conv_kernel", CONV | {"STRIPS": 4, "STRIP": 8, "TAP_MAJOR": True}, 4),
    ("conv_kernels", "conv_step_kernel", CONV_STEP | {"TAP_MAJOR": True, "PDL": True}, 4),
    ("conv_kernels", "conv_step_kernel", CONV_STEP | {"TAP_MAJOR": False, "PDL": False}, 4),
    ("conv_backward_kernels", "conv_backward_weight_kernel", CONV | {"BLOCK_K": 4, "BLOCK_T": 16}, 4),
    ("conv_backward_kernels", "conv_backward_head_kernel", CONV | {"BLOCK_K": 4}, 4),
    ("conv_backward_kernels", "conv_backward_input_kernel", {"K": WIDTH, "BLOCK_T": 16, "BLOCK_D": 128}, 4),
    ("norm_kernels", "norm_kernel", NORM | {"KEEP_SCALE": True}, 4),
    ("norm_kernels", "norm_backward_kernel", NORM | {"HAS_TOTAL": True}, 4),
    ("step_lag_kernels", "turn_kernel", {"BLOCK_B": 128}, 4),
    ("step_lag_kernels", "settle_kernel", {"N": NUM_STATES, "BLOCK_N": 16, "BLOCK_D": 256}, 4),
    ("quantized_kernels", "dequantize_kernel", {"BLOCK": 4096}, 4),
]
# pointers to anything but bf16
TYPES = (
    {"slots_ptr": "*i64", "table_ptr": "*i64"}
    | dict.fromkeys(("cu_seqlens_ptr", "seq_idx_ptr", "phases_ptr"), "*i32")
    | {
        f"{name}_ptr": "*fp32"
        for name in (
            *("a", "da", "db", "dc", "dd", "dbias", "dweight", "dpre"),
            *("checkpoint", "scratch", "entry", "total", "scale", "scales"),
        )
    }
)
UNALIGNED = frozenset({"nothing", "b_stride", "c_stride", "num_rows"})


def compile_all() -> Iterator[dict[str, Any]]:
    for module, name, constants, num_warps in KERNELS:
        kernel = getattr(importlib.import_module(f"mamba_core.ops.triton.{module}"), name)
        own = {"state_ptr": "*bf16" if module == "conv_kernels" else "*fp32"}
        if module == "quantized_kernels":
            own["w_ptr"] = "*i8"
        source = source_of(kernel, constants, TYPES | own, unaligned=UNALIGNED)
        compiled = compiled_for_hopper(source, num_warps=num_warps)
        assembly = compiled.asm["ptx"]
        yield {
            "kernel": name,
            "type": type(kernel).__name__,
            "cubin_bytes": len(compiled.asm["cubin"]),
            "shared_bytes": compiled.metadata.shared,
            "narrow_accesses": len(re.findall(r"(?:ld|st)\.global\.b16", assembly)),
            "wide_accesses": len(re.findall(r"(?:ld|st)\.global\.v4\.b32", assembly)),
            "shuffles": assembly.count("shfl.sync"),
            "specialised": [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)],
        }


if __name__ == "__main__":
    print_records(compile_all())
