"""Launches of ``step_wgmma_kernel``: the products of a decode step of 17 to 256 rows on Hopper."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mamba_core.ops.triton.step_wgmma_kernel import (
    DEEP,
    TILES,
    Sizes,
    wgmma_kernel,
    wgmma_shared_kernel,
)

_DEEP = DEEP.value
_TILES = TILES.value


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


def layout_of(columns: int) -> gl.NVMMASharedLayout:
    """Of a tile [rows, columns] in 16 bits as it leaves."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


def warps_of(tile: WideTile) -> int:
    """Warps that multiply."""
    return 4 if tile.rows == 64 else 8


def registers_of(tile: WideTile) -> int:
    """Of a thread, before those that fetch leave theirs to those that multiply.

    As few as do without spilling: the kernels before and after then reside beside this one, which can fetch its first
    weights while they run.
    """
    sums = tile.rows * tile.width // (32 * warps_of(tile))
    return 96 if sums <= 80 else 128


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
        maxnreg=registers_of(tile),
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
        maxnreg=registers_of(tile),
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
