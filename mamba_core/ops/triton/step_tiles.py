"""How the products of a decode step are cut up, by the number of rows, their sizes and the type of their weights.

All figures are from an H200.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from mamba_core.ops.triton.quantized import Matrix
from mamba_core.ops.triton.step_wgmma import has_wgmma

# rows up to which a product multiplies row by row while its weights stream by
VERY_FEW_ROWS = 2
# rows up to which the programs of a product can also make the norm behind it
FEW_ROWS = 32
# rows up to which our own products stream the weights faster than the library's do
SOME_ROWS = 64
# the same on Hopper, and of layers there whose states are less wide
SOME_ROWS_OF_HOPPER, SOME_ROWS_OF_NARROW = 16, 32
_NARROW_STATES = 2048
# the same for the two large products of layers up to so wide
NARROW_ROWS = 128
NARROW = 768


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program multiplies: rows, outputs, inputs in all and at a time, and how many tiles are on their way."""

    rows: int
    outputs: int
    share: int
    inputs: int
    stages: int


def some_rows(dim: int, device: torch.device) -> int:
    """Rows of D channels up to which a step goes about them as about few, by a single launch where there is one."""
    if not has_wgmma(device):
        return SOME_ROWS
    return SOME_ROWS_OF_NARROW if dim < _NARROW_STATES else SOME_ROWS_OF_HOPPER


def is_many(rows: int, dim: int, device: torch.device) -> bool:
    """Whether a step goes about so many rows of D channels as about many; see ``some_rows``. Their states may lag."""
    return rows > some_rows(dim, device)


def rows_one_by_one(matrix: Matrix) -> int:
    """Rows up to which a product multiplies row by row; to widen int8 for each of them is dear."""
    return VERY_FEW_ROWS if matrix.scales is None else 1


def rows_of_own(matrix: Matrix, width: int) -> int:
    """Rows up to which our own kernels make the two large products of layers so wide faster than the library's do."""
    return NARROW_ROWS if width <= NARROW and matrix.scales is None else SOME_ROWS


def tile_in(matrix: Matrix, rows: int) -> Tile:
    (width, size), block = matrix.shape, _block_rows(rows)
    if matrix.scales is not None and rows <= FEW_ROWS and size % 256 == 0:
        return Tile(block, 32, size, 256, 6)
    # smaller tiles where there would be too few to keep the chip busy
    if width <= 64 * 132:
        block = min(block, 32)
    inputs = 128 if size % 128 == 0 or size > 512 else 64
    return Tile(block, 64, size, inputs, 6 if block * inputs <= 64 * 128 else 4)


def tile_whole(matrix: Matrix, rows: int) -> Tile:
    """A product of very many outputs, which no kernel follows that could use what it leaves."""
    tile, size = tile_in(matrix, rows), matrix.shape[1]
    return replace(tile, share=size + -size % 64, stages=tile.stages if matrix.scales is not None else 4)


def tile_low(matrix: Matrix, rows: int) -> Tile:
    """For more rows than SOME_ROWS without the sum of the shares."""
    dim = matrix.shape[1]
    if rows > SOME_ROWS:
        return Tile(32, 64, _share(dim, 10), 128, 4)
    if rows > FEW_ROWS:
        return Tile(16, 64, _share(dim, 16), 128, 4)
    return _tile_shared(rows, dim, 16, 8) if matrix.scales is None else Tile(16, 16, _share(dim, 16), 128, 4)


def tile_delta(rank: int, *, is_many: bool) -> Tile:
    """dt_proj, whose inputs are few: all of them belong to a program, which for many rows takes 64 at a time."""
    whole = max(16, triton.next_power_of_2(rank))
    if not is_many:
        return Tile(16, 64, whole, whole, 1)
    return Tile(64, 64, whole, min(whole, 64), 1)


def tile_out(matrix: Matrix, rows: int) -> Tile:
    """For more rows than FEW_ROWS without the sum of the shares."""
    dim = matrix.shape[1]
    if matrix.scales is not None:
        block = _block_rows(rows)
        return Tile(block, 32, _share(dim, 6), 128, 8) if rows <= FEW_ROWS else Tile(block, 64, _share(dim, 4), 128, 3)
    if rows <= 16:
        return Tile(16, 64, _share(dim, 6), 128, 5)
    return _tile_shared(rows, dim, 64, 5 if rows <= FEW_ROWS else 8)


def _tile_shared(rows: int, size: int, outputs: int, shares: int) -> Tile:
    block = _block_rows(rows)
    return Tile(block, outputs, _share(size, shares), 128 if block < 64 else 64, 4)


def _share(size: int, shares: int) -> int:
    """Inputs of each of so many programs: a multiple of 64, the least a program takes at a time."""
    return int(triton.cdiv(triton.cdiv(size, shares), 64)) * 64


def whole_rows(size: int) -> dict[str, int | bool]:
    """How a program covers whole rows of this many inputs: without a masked column, if five tiles can."""
    block = min(size & -size, 2048)
    steps = size // block
    if steps <= 5:
        return {"BLOCK_K": block, "STEPS": steps, "EXACT": True}
    return {"BLOCK_K": triton.next_power_of_2(size), "STEPS": 1, "EXACT": False}


def _block_rows(rows: int) -> int:
    """Rows of a tile: all of them, up to 64."""
    return min(max(16, triton.next_power_of_2(rows)), 64)
