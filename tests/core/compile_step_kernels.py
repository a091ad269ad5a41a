"""Compile the kernels of a fused step for a Hopper GPU, as ``compile_kernels`` does for those of the ops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mamba_core.ops.triton import (
    step_kernels,
    step_many_kernel,
    step_matvec_kernels,
    step_product_kernels,
    step_state_kernels,
)
from mamba_core.ops.triton.step_many import REGISTERS
from tests.compiling import compiled_for_hopper, print_records, source_of

MODULES = (step_kernels, step_many_kernel, step_matvec_kernels, step_product_kernels, step_state_kernels)

ROWS = {"ROWS": 2, "BLOCK_R": 2, "BLOCK_N": 4, "BLOCK_K": 512, "STEPS": 5, "EXACT": True}
TILE = {"BLOCK_B": 16, "BLOCK_N": 64, "BLOCK_K": 128, "EVEN": True}
IN = {"K": 4, "TAP_MAJOR": True, "HAS_BIAS": False, "HAS_CONV_BIAS": True, "PARTS": 640, "BLOCK_P": 1024}
NO_CONV = {"K": 0, "TAP_MAJOR": False, "HAS_CONV_BIAS": False}
LATE = {"EARLY": False, "TAP_MAJOR": False}
SHARED = {"SHARE": 640, "SHARES": 8}
LOW = {"R": 160, "BLOCK_R": 256, "NORM": True}
MANY = {"R": 160, "BLOCK_R": 64, "NORM": True, "RAW": True, "BLOCK_B": 128, "BLOCK_D": 128}
STATES = {"N": 16, "BLOCK_N": 16, "BLOCK_D": 32}

# kernel and constants; all with PDL, which has instructions of its own
KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("embed_kernel", {"BLOCK_H": 4096}),
    ("matvec_in_kernel", IN | ROWS | {"X_ROW": 1}),
    (
        "matvec_in_kernel",
        ROWS | NO_CONV | {"HAS_BIAS": False, "PARTS": 0, "BLOCK_P": 1, "X_ROW": 2},
    ),
    ("matvec_out_kernel", ROWS | {"HAS_BIAS": True}),
    ("product_in_kernel", IN | TILE | {"EARLY": True, "PARTS": 40, "BLOCK_P": 64}),
    (
        "product_in_kernel",
        IN | TILE | LATE | {"PARTS": 0, "BLOCK_P": 1, "BLOCK_B": 64, "EVEN": False},
    ),
    ("product_shared_kernel", TILE | SHARED | {"SUM": True}),
    ("product_out_kernel", TILE | SHARED | {"HAS_BIAS": False}),
    ("gather_kernel", {"SHARES": 8, "HAS_BIAS": False, "BLOCK_H": 4096}),
    ("finish_kernel", {"PARTS": 640, "BLOCK_P": 1024, "BLOCK_H": 4096}),
    ("sum_kernel", {"SHARES": 10, "BLOCK": 128}),
    ("delta_kernel", LOW | {"WIDTH": 192, "RAW": False, "BLOCK_B": 16, "BLOCK_D": 64}),
    ("delta_kernel", MANY | {"WIDTH": 192}),
    ("advance_kernel", LOW | STATES | {"OWN_DELTA": True, "RAW_DELTA": False, "LAGS": False}),
    ("advance_kernel", LOW | STATES | {"OWN_DELTA": False, "RAW_DELTA": True, "LAGS": False}),
    ("advance_kernel", LOW | STATES | {"OWN_DELTA": False, "RAW_DELTA": True, "LAGS": True}),
    ("advance_many_kernel", {"R": 160, "LAGS": False}),
    ("advance_many_kernel", {"R": 160, "LAGS": True}),
]
TYPES = {
    **dict.fromkeys(("slots_ptr", "tokens_ptr"), "*i64"),
    **dict.fromkeys(
        ("squares_ptr", "residual_ptr", "low_ptr", "delta_ptr", "a_ptr", "d_ptr", "share_ptr", "kept_b_ptr"), "*fp32"
    ),
    **dict.fromkeys(("count_ptr", "phases_ptr"), "*i32"),
}
INT8 = {"w_ptr": "*i8", "scales_ptr": "*fp32"}
# those that take a large matrix, in either type
CASES = [(name, constants, TYPES) for name, constants in KERNELS] + [
    (name, constants, TYPES | INT8) for name, constants in KERNELS if name.startswith(("matvec", "product"))
]


def _stores_before_barrier(code: str) -> int:
    """Stores that come before the kernel's own barrier, all of them where there is none."""
    return re.split(r"\bbarrier\b", code)[0].count("tt.store")


def compile_all() -> Iterator[dict[str, Any]]:
    for name, constants, types in CASES:
        kernel = next(getattr(module, name) for module in MODULES if hasattr(module, name))
        is_many = name == "advance_many_kernel"
        own = {"state_ptr": "*fp32"} if name.startswith("advance") else {}
        own |= dict.fromkeys(("low_ptr", "delta_ptr", "d_ptr"), "*bf16") if is_many else {}
        unaligned = frozenset({"num_rows", "own_rows"})
        source = source_of(kernel, constants | {"PDL": True}, types | own, unaligned=unaligned)
        limits = {"num_warps": 1, "maxnreg": REGISTERS} if is_many else {"num_warps": 4}
        compiled = compiled_for_hopper(source, launch_pdl=True, **limits)
        assembly = compiled.asm["ptx"]
        yield {
            "kernel": name,
            "cubin_bytes": len(compiled.asm["cubin"]),
            "waits": assembly.count("griddepcontrol.wait"),
            "launches": assembly.count("griddepcontrol.launch_dependents"),
            "waits_first": assembly.find("griddepcontrol.wait") < assembly.find("griddepcontrol.launch_dependents"),
            "has_matrix_instructions": "mma" in assembly,
            "local_accesses": len(re.findall(r"\b(?:STL|LDL)\b", compiled.asm["sass"])),
            "copies": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", assembly)),
            "stores_before_barrier": _stores_before_barrier(compiled.asm["ttgir"]),
            "specialised": [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)],
        }


if __name__ == "__main__":
    print_records(compile_all())
