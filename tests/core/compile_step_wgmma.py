"""Compile the large products of a decode step for a Hopper GPU, as ``compile_kernels`` does for the ops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mamba_core.ops.triton.step_wgmma import WideTile, layout_of, registers_of, warps_of
from mamba_core.ops.triton.step_wgmma_kernel import TILES, Sizes, wgmma_kernel, wgmma_shared_kernel
from tests.compiling import compiled_for_hopper, print_records, source_of

# of in_proj and of out_proj, 2560, 2048 and 768 wide, of up to 256 rows
CASES = [
    WideTile(128, 128, 32, 6),
    WideTile(128, 64, 16, 8),
    WideTile(256, 64, 16, 5),
    WideTile(128, 128, 0, 6),
    WideTile(64, 64, 32, 8),
    WideTile(128, 128, 32, 6, shares=4),
    WideTile(256, 128, 0, 4, shares=6),
    WideTile(128, 128, 0, 6, shares=4),
    WideTile(64, 64, 32, 8, shares=4),
    # of up to 64 rows
    WideTile(64, 64, 16, 12),
    WideTile(64, 32, 8, 16, shares=2),
    # of x_proj
    WideTile(64, 128, 64, 4, shares=20),
    WideTile(64, 16, 0, 4, shares=6),
]


def _types(tile: WideTile) -> dict[str, str]:
    def described(rows: int, columns: int, layout: Any) -> str:
        return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

    deep, tiles = 64, TILES.value
    more = tile.more or tile.outputs
    types = {
        "x_desc": described(tile.rows, deep, tiles),
        "a_desc": described(tile.outputs, deep, tiles),
        "b_desc": described(more, deep, tiles),
    }
    if tile.shares > 1:
        return types | {"share_ptr": "*fp32"}
    return types | {
        "y_a_desc": described(tile.rows, tile.outputs, layout_of(tile.outputs)),
        "y_b_desc": described(tile.rows, more, layout_of(more)),
    }


def compile_all() -> Iterator[dict[str, Any]]:
    for tile in CASES:
        constants: dict[str, Any] = {"SIZES": Sizes(tile.rows, tile.outputs, tile.more, tile.stages, PDL=True)}
        kernel = wgmma_kernel
        if tile.shares > 1:
            kernel, constants = wgmma_shared_kernel, constants | {"SHARE": 20}
        types = _types(tile)
        descs = frozenset(name for name in types if name.endswith("_desc"))
        source = source_of(kernel, constants, types, unaligned=descs | {"num_rows", "in_tiles"})
        compiled = compiled_for_hopper(source, num_warps=warps_of(tile), maxnreg=registers_of(tile), launch_pdl=True)
        assembly = compiled.asm["ptx"]
        yield {
            "kernel": kernel.__name__,
            "tile": [tile.rows, tile.outputs, tile.more, tile.stages],
            "shared_bytes": compiled.metadata.shared,
            "local": len(re.findall(r"\b(?:STL|LDL)\b", compiled.asm["sass"])),
            "stages": tile.stages,
            "parts": 2 if tile.more > 0 else 1,
            "fetches": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", assembly)),
            "writes": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.global", assembly)),
            "products": sorted(set(re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k16)", assembly))),
            "awaited": re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", assembly),
            "waits": assembly.count("griddepcontrol.wait"),
            "launches": assembly.count("griddepcontrol.launch_dependents"),
        }


if __name__ == "__main__":
    print_records(compile_all())
