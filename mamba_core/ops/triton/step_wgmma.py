"""Launches of ``step_wgmma_kernel``, and the products of a decode step of 17 to 256 rows that it is for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mamba_core.ops.triton.devices import compiles_for_nvidia
from mamba_core.ops.triton.quantized import Matrix
from mamba_core.ops.triton.step_wgmma_kernel import (
    DEEP,
    TILES,
    Sizes,
    layout_of,
    wgmma_kernel,
    wgmma_shared_kernel,
)

_DEEP = DEEP.value
_TILES = TILES.value

# of a thread, before those that fetch leave theirs to those that multiply: as few as do without spilling. The kernels
# before and after then reside beside this one, which can fetch its first weights while they run
REGISTERS = 96
# of x_proj: programs, and shares
_PROGRAMS = 120
_LEAST_SHARES, _MOST_SHARES = 6, 20


@dataclass(frozen=True, slots=True)
class WideTile:
    """What a program makes: ``rows`` by ``outputs`` + ``more`` outputs, from ``shares``-th parts of the inputs."""

    rows: int
    outputs: int
    more: int
    stages: int
    shares: int = 1

    @property
    def width(self) -> int:
        return self.outputs + self.more

    def fits(self, out_width: int, in_width: int) -> bool:
        """Whether a product of this width has whole tiles, and no share without any."""
        in_tiles = in_width // _DEEP
        share = triton.cdiv(in_tiles, self.shares)
        return out_width % self.width == 0 and in_width % _DEEP == 0 and (self.shares - 1) * share < in_tiles


_Table = tuple[tuple[int, float, tuple[WideTile, ...]], ...]

# of up to so many rows, of layers up to so wide: the first that fits is taken; others are faster in the library
# (on an H200)
_TILES_IN: _Table = (
    (64, math.inf, (WideTile(64, 64, 16, 12), WideTile(64, 64, 0, 12))),
    (128, 1024, (WideTile(64, 64, 0, 8),)),
    (128, 2560, (WideTile(128, 64, 16, 8), WideTile(128, 64, 0, 8))),
    (256, 1024, (WideTile(128, 64, 0, 8),)),
    (256, 2560, (WideTile(128, 128, 32, 6), WideTile(128, 64, 32, 8), WideTile(128, 128, 0, 6))),
)
_TILES_OUT: _Table = (
    (64, 1024, (WideTile(64, 32, 0, 12, shares=2),)),
    (64, math.inf, (WideTile(64, 64, 16, 8, shares=4), WideTile(64, 64, 0, 8, shares=4))),
    (128, 1024, (WideTile(64, 64, 0, 8, shares=4),)),
    (128, 2560, (WideTile(128, 64, 16, 8, shares=4), WideTile(128, 64, 0, 8, shares=4))),
    (256, 1024, (WideTile(64, 64, 0, 8, shares=2),)),
    (256, 1536, (WideTile(128, 64, 0, 8, shares=2),)),
    (256, 2048, (WideTile(128, 128, 0, 6, shares=4),)),
)
# the same kernels of x_proj up to each of few numbers of rows, for which steps are compiled first
_ROWS_LOW = (64, 128, 256)


def tile_in(matrix: Matrix, rows: int) -> WideTile | None:
    """How in_proj [2 D, H] is cut up for so many rows, where that is faster than what else there is."""
    return _choose(_TILES_IN, matrix, rows, matrix.shape[1])


def tile_out(matrix: Matrix, rows: int) -> WideTile | None:
    """The same of out_proj [H, D], in shares."""
    return _choose(_TILES_OUT, matrix, rows, matrix.shape[0])


def _choose(table: _Table, matrix: Matrix, rows: int, layer_width: int) -> WideTile | None:
    tiles = next((tiles for most, widest, tiles in table if rows <= most and layer_width <= widest), ())
    return next((tile for tile in tiles if _usable(matrix, tile) is not None), None)


def tile_low(matrix: Matrix, rows: int) -> WideTile | None:
    """The same of x_proj: shares enough for nearly all multiprocessors, and no more than are soon added up."""
    width, dim = matrix.shape
    most = next((most for most in _ROWS_LOW if rows <= most), None)
    if most is None:
        return None

    def num_shares(outputs: int) -> int:
        return _PROGRAMS // (most // 64 * triton.cdiv(width, outputs))

    sizes = [outputs for outputs in (32, 64) if width % outputs == 0] or [16]
    outputs = next((size for size in sizes if num_shares(size) >= _LEAST_SHARES), sizes[-1])
    tiles = triton.cdiv(dim // _DEEP, min(max(num_shares(outputs), 1), _MOST_SHARES))
    return _usable(matrix, WideTile(64, outputs, 0, min(tiles, 12), shares=triton.cdiv(dim // _DEEP, tiles)))


def _usable(matrix: Matrix, tile: WideTile) -> WideTile | None:
    """The tile, if it fits the product and the device has the units it is for."""
    weight = matrix.weight
    is_bf16 = weight.dtype == torch.bfloat16 and weight.is_contiguous()
    return tile if is_bf16 and tile.fits(*weight.shape) and has_wgmma(weight.device) else None


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether kernels are compiled for Hopper, and not interpreted."""
    return compiles_for_nvidia(device) and torch.cuda.get_device_capability(device)[0] == 9


def warps_of(tile: WideTile) -> int:
    """Warps that multiply."""
    return 4 if tile.rows == 64 else 8


def project(x: Tensor, weight: Tensor, y: Tensor, tile: WideTile, *, pdl: bool) -> None:
    """y [B, out] = x [B, in] W^T; weight [out, in]. All contiguous, in bf16, aligned to 16 bytes."""
    (rows, in_width), out_width = x.shape, weight.shape[0]
    assert tile.shares == 1
    assert tile.fits(out_width, in_width)
    grid = (triton.cdiv(rows, tile.rows), out_width // tile.width)
    wgmma_kernel[grid](
        *_inputs(x, weight, tile),
        *_outputs(y, tile),
        in_width // _DEEP,
        SIZES=Sizes(tile.rows, tile.outputs, tile.more, tile.stages, pdl),
        num_warps=warps_of(tile),
        maxnreg=REGISTERS,
        launch_pdl=pdl,
    )


def share_out(x: Tensor, weight: Tensor, shares: Tensor, tile: WideTile, *, pdl: bool) -> None:
    """x [B, in] W^T in shares of the inputs, ``shares`` [shares, B, out] fp32. As ``project``, of an x that may
    be columns of a wider one.
    """
    (rows, in_width), out_width = x.shape, weight.shape[0]
    assert tile.fits(out_width, in_width)
    grid = (triton.cdiv(rows, tile.rows), out_width // tile.width, tile.shares)
    wgmma_shared_kernel[grid](
        *_inputs(x, weight, tile),
        shares,
        rows,
        out_width,
        in_width // _DEEP,
        SHARE=triton.cdiv(in_width // _DEEP, tile.shares),
        SIZES=Sizes(tile.rows, tile.outputs, tile.more, tile.stages, pdl),
        num_warps=warps_of(tile),
        maxnreg=REGISTERS,
        launch_pdl=pdl,
    )


def _inputs(x: Tensor, weight: Tensor, tile: WideTile) -> tuple[TensorDescriptor, ...]:
    a = TensorDescriptor.from_tensor(weight, [tile.outputs, _DEEP], _TILES)
    b = TensorDescriptor.from_tensor(weight, [tile.more, _DEEP], _TILES) if tile.more > 0 else a
    return TensorDescriptor.from_tensor(x, [tile.rows, _DEEP], _TILES), a, b


def _outputs(y: Tensor, tile: WideTile) -> tuple[TensorDescriptor, ...]:
    a = TensorDescriptor.from_tensor(y, [tile.rows, tile.outputs], layout_of(tile.outputs))
    if tile.more == 0:
        return a, a
    return a, TensorDescriptor.from_tensor(y, [tile.rows, tile.more], layout_of(tile.more))
