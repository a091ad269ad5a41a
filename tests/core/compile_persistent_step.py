"""Compile the persistent step for a Hopper GPU, as ``compile_kernels`` does for the kernels of the ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.persistent_step import sizes_for
from mamba_core.ops.triton.persistent_step_kernel import persistent_step_kernel
from tests.compiling import compiled_for_hopper, persistent_facts, print_records, source_of

PROGRAMS = 132
# one of everything that published models have not
ODD = {"HAS_BIAS": True, "HAS_CONV_BIAS": False, "TAP_MAJOR": False, "NORM": True, "SKIP_DTYPE": gl.bfloat16}
# H, R, N, K, the bytes of a weight and what else a model may have: published sizes, and another
SIZES: list[tuple[int, int, int, int, int, dict[str, Any]]] = [
    (1024, 64, 16, 4, 2, {}),
    (2048, 128, 16, 4, 2, {}),
    (2560, 160, 16, 4, 2, {}),
    (1024, 64, 16, 4, 1, {}),
    (2560, 160, 16, 4, 1, {}),
    (
        512,
        40,
        12,
        3,
        2,
        ODD,
    ),
]
TYPES = {
    **dict.fromkeys(("table_ptr", "tokens_ptr", "slots_ptr"), "*i64"),
    **dict.fromkeys(("low_ptr", "squares_ptr", "ssm_ptr"), "*fp32"),
    "counter_ptr": "*i32",
    "inner_eps": "fp32",
}
UNALIGNED = frozenset({"layers", "inner_eps"})
# written by other programs of the same launch
SHARED = ("gained_ptr", "squares_ptr", "x_ptr", "low_ptr", "y_ptr")


def compile_all() -> Iterator[dict[str, Any]]:
    for width, rank, states, taps, weight_bytes, changes in SIZES:
        sizes = sizes_for(width, rank, states, taps, PROGRAMS, weight_bytes)
        sizes = sizes._replace(WEIGHT_DTYPE=gl.bfloat16 if weight_bytes == 2 else gl.int8, **changes)
        source = source_of(
            persistent_step_kernel, {"SIZES": sizes}, TYPES, unaligned=frozenset({"layers", "inner_eps"})
        )
        compiled = compiled_for_hopper(source, num_warps=sizes.WARPS)
        yield {
            "width": width,
            **persistent_facts(compiled),
            "weight_bytes": weight_bytes,
        }


if __name__ == "__main__":
    print_records(compile_all())
