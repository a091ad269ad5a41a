"""Launches of the products of a decode step, whole or in shares of their inputs, and what goes with every launch."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from mamba_core.ops.triton import step_wgmma
from mamba_core.ops.triton.devices import compiles_for_nvidia
from mamba_core.ops.triton.quantized import Matrix
from mamba_core.ops.triton.step_matvec_kernels import matvec_in_kernel
from mamba_core.ops.triton.step_product_kernels import product_shared_kernel, sum_kernel
from mamba_core.ops.triton.step_tiles import FEW_ROWS, SOME_ROWS, Tile, rows_one_by_one, tile_whole, whole_rows

# tiles whose programs count themselves: more than there are in any product
MAX_TILES = 8192


@cache
def has_pdl(device: torch.device) -> bool:
    """Whether kernels can start while the one before them still runs."""
    return compiles_for_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """What kernels with a PDL are told and launched with."""
    pdl = has_pdl(device)
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


def project_head(hidden: Tensor, matrix: Matrix) -> Tensor:
    """Logits [B, V] fp32 of hidden [B, H], bf16 or fp16; matrix [V, H]."""
    rows, hidden = hidden.shape[0], hidden.contiguous()
    if 0 < rows <= rows_one_by_one(matrix):
        return multiply_rows(hidden, matrix, rows, x_row=1, block=4, warps=2 * rows)
    if 0 < rows <= (FEW_ROWS if matrix.scales is None else SOME_ROWS):
        return _multiply_whole(hidden, matrix, rows)
    return torch.mm(hidden, matrix.transposed(hidden.dtype), out_dtype=torch.float32)


def _multiply_whole(x: Tensor, matrix: Matrix, rows: int) -> Tensor:
    """x W^T [B, out] fp32 of several rows, in one share."""
    (width, size), device = matrix.shape, matrix.device
    tile = tile_whole(matrix, rows)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.outputs), 1)
    y = torch.empty((rows, width), dtype=torch.float32, device=device)
    product_shared_kernel[grid](
        x,
        *matrix.pointers,
        y,
        y,
        y,
        rows,
        size,
        size,
        width,
        SUM=False,
        **tile_options(tile, grid, size),
        **launch_options(device),
    )
    return y


def multiply_rows(x: Tensor, matrix: Matrix, rows: int, *, x_row: int, block: int, warps: int) -> Tensor:
    """x W^T [B, out] fp32 of very few rows, which lie ``x_row`` times their width apart; matrix [out, in]."""
    width, size = matrix.shape
    y = torch.empty((rows, width), dtype=torch.float32, device=matrix.device)
    matvec_in_kernel[(triton.cdiv(width, block),)](
        x,
        x,
        *matrix.pointers,
        x,
        x,
        x,
        y,
        x,
        x,
        size,
        width,
        0,
        0,
        0.0,
        K=0,
        TAP_MAJOR=False,
        PARTS=0,
        BLOCK_P=1,
        HAS_BIAS=False,
        HAS_CONV_BIAS=False,
        ROWS=rows,
        BLOCK_R=triton.next_power_of_2(rows),
        BLOCK_N=block,
        X_ROW=x_row,
        num_warps=warps,
        **whole_rows(size),
        **launch_options(matrix.device),
    )
    return y


def share_out(x: Tensor, matrix: Matrix, tile: Tile, counters: Tensor, total: Tensor | None = None) -> Tensor:
    """x [B, in] W^T in shares of the inputs, [shares, B, out] fp32, and their sum in ``total`` [B, out] if given."""
    rows, (width, size) = x.shape[0], matrix.shape
    grid, share = shares_of(tile, rows, width, size, matrix.device)
    product_shared_kernel[grid](
        x,
        *matrix.pointers,
        share if total is None else total,
        share,
        counters,
        rows,
        x.stride(0),
        size,
        width,
        SUM=total is not None,
        **tile_options(tile, grid, size),
        **launch_options(matrix.device),
    )
    return share


def share_wide(x: Tensor, matrix: Matrix, tile: step_wgmma.WideTile) -> Tensor:
    """x [B, in] W^T in shares of the inputs, [shares, B, out] fp32, on the matrix units of Hopper."""
    shares = torch.empty((tile.shares, x.shape[0], matrix.shape[0]), dtype=torch.float32, device=x.device)
    step_wgmma.share_out(x, matrix.weight, shares, tile, pdl=has_pdl(x.device))
    return shares


def sum_shares(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """Of shares [shares, B, out] fp32."""
    y = torch.empty(shares.shape[1:], dtype=dtype, device=shares.device)
    sum_kernel[(triton.cdiv(y.numel(), 128),)](
        shares, y, y.numel(), SHARES=shares.shape[0], BLOCK=128, num_warps=4, **launch_options(y.device)
    )
    return y


def shares_of(
    tile: Tile, rows: int, width: int, size: int, device: torch.device
) -> tuple[tuple[int, int, int], Tensor]:
    """The programs of a product whose inputs are shared out, and room for what they make."""
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.outputs), triton.cdiv(size, tile.share))
    assert grid[0] * grid[1] <= MAX_TILES
    return grid, torch.empty((grid[2], rows, width), dtype=torch.float32, device=device)


def tile_options(tile: Tile, grid: tuple[int, int, int], size: int) -> dict[str, int | bool]:
    """What the kernel of a shared product is compiled with."""
    return {
        "SHARE": tile.share,
        "SHARES": grid[2],
        "BLOCK_B": tile.rows,
        "BLOCK_N": tile.outputs,
        "BLOCK_K": tile.inputs,
        "EVEN": size % tile.share == 0 and tile.share % tile.inputs == 0,
        "num_warps": 4,
        "num_stages": tile.stages,
    }
