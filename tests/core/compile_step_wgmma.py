"""Compile the products of a decode step of many rows for a Hopper GPU, as ``compile_kernels`` does for the ops."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from mamba_core.ops.triton import step_wgmma
from mamba_core.ops.triton.quantized import Matrix
from mamba_core.ops.triton.step_wgmma import (
    REGISTERS,
    WideTile,
    tile_in,
    tile_low,
    tile_out,
    warps_of,
)
from mamba_core.ops.triton.step_wgmma_kernel import TILES, Sizes, layout_of, wgmma_kernel, wgmma_shared_kernel
from tests.compiling import compiled_for_hopper, print_records, source_of

# of published models; rows that stand for all up to them
WIDTHS = (768, 1024, 1536, 2048, 2560)
ROWS = (64, 128, 256)


def chosen_tiles() -> list[WideTile]:
    """Each once, for whatever product it is."""
    tiles: dict[WideTile, None] = {}
    with mock.patch.object(step_wgmma, "has_wgmma", return_value=True):
        for width, rows in itertools.product(WIDTHS, ROWS):
            for choose, shape in (
                (tile_in, (4 * width, width)),
                (tile_low, (width // 16 + 32, 2 * width)),
                (tile_out, (width, 2 * width)),
            ):
                tile = choose(Matrix(torch.empty(shape, dtype=torch.bfloat16, device="meta")), rows)
                if tile is not None:
                    tiles[tile] = None
    return list(tiles)


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
    for tile in chosen_tiles():
        constants: dict[str, Any] = {"SIZES": Sizes(tile.rows, tile.outputs, tile.more, tile.stages, PDL=True)}
        kernel = wgmma_kernel
        if tile.shares > 1:
            kernel, constants = wgmma_shared_kernel, constants | {"SHARE": 20}
        types = _types(tile)
        descs = frozenset(name for name in types if name.endswith("_desc"))
        source = source_of(kernel, constants, types, unaligned=descs | {"num_rows", "in_tiles"})
        compiled = compiled_for_hopper(source, num_warps=warps_of(tile), maxnreg=REGISTERS, launch_pdl=True)
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
