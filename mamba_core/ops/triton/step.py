"""One token per row through a Mamba layer on the GPU: launches of ``step_kernels``, chosen by the number of rows.

``Step`` is what the launches of one step share. All activations are contiguous; the residual is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mamba_core.ops.lag import Lag
from mamba_core.ops.triton import step_wgmma
from mamba_core.ops.triton.conv import convolve_step
from mamba_core.ops.triton.layout import is_tap_major
from mamba_core.ops.triton.quantized import Matrix
from mamba_core.ops.triton.step_kernels import embed_kernel, finish_kernel
from mamba_core.ops.triton.step_many import advance_many, fits
from mamba_core.ops.triton.step_matvec_kernels import matvec_in_kernel, matvec_out_kernel
from mamba_core.ops.triton.step_product_kernels import (
    gather_kernel,
    product_in_kernel,
    product_out_kernel,
)
from mamba_core.ops.triton.step_products import (
    has_pdl,
    launch_options,
    multiply_rows,
    share_out,
    share_wide,
    shares_of,
    sum_shares,
    tile_options,
)
from mamba_core.ops.triton.step_state_kernels import advance_kernel, delta_kernel
from mamba_core.ops.triton.step_tiles import (
    FEW_ROWS,
    SOME_ROWS,
    VERY_FEW_ROWS,
    is_many,
    rows_of_own,
    rows_one_by_one,
    tile_delta,
    tile_in,
    tile_low,
    tile_out,
    whole_rows,
)


@dataclass(frozen=True, slots=True)
class Gained:
    """A norm [B, H], or with parts > 0 what it is before its division by the rms, from squares [parts, B]."""

    values: Tensor
    squares: Tensor
    parts: int


@dataclass(frozen=True, slots=True)
class Step:
    """slots [B] int64; counters [MAX_TILES] int32, zero whenever no step is under way; eps of the norms."""

    slots: Tensor
    counters: Tensor
    eps: float

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]

    def is_many(self, dim: int) -> bool:
        """Whether the rows, of D channels, are gone about as many are."""
        return is_many(self.num_rows, dim, self.slots.device)


def embed(step: Step, tokens: Tensor, table: Tensor, gain: Tensor) -> tuple[Tensor, Gained]:
    """tokens [B], table [V, H] -> residual [B, H] fp32, and the first norm."""
    rows, width = step.num_rows, table.shape[1]
    residual = torch.empty((rows, width), dtype=torch.float32, device=table.device)
    values = torch.empty((rows, width), dtype=table.dtype, device=table.device)
    embed_kernel[(rows,)](
        tokens,
        table,
        gain,
        residual,
        values,
        width,
        step.eps,
        BLOCK_H=triton.next_power_of_2(width),
        num_warps=4,
        **launch_options(table.device),
    )
    return residual, Gained(values, residual, 0)


def project_in(
    step: Step,
    x: Gained,
    matrix: Matrix,
    bias: Tensor | None,
    taps: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
) -> Tensor:
    """in_proj of the norm and the convolution of its first half: [B, 2 D]; matrix [2 D, H], taps [D, K]."""
    rows, (width, size) = step.num_rows, matrix.shape
    dim, taps_width = taps.shape
    y = torch.empty((rows, width), dtype=x.values.dtype, device=matrix.device)
    wide = step_wgmma.tile_in(matrix, rows) if step.is_many(dim) else None
    if wide is not None or rows > rows_of_own(matrix, size):
        if wide is not None:
            step_wgmma.project(x.values, matrix.weight, y, wide, pdl=has_pdl(y.device))
        else:
            torch.mm(x.values, matrix.transposed(y.dtype), out=y)
        if bias is not None:
            y += bias
        x_half = y[:, :dim]
        convolve_step(x_half, taps, conv_bias, conv_state, step.slots, x_half, launch_options(y.device))
        return y
    arguments = (
        x.values,
        x.squares,
        *matrix.pointers,
        x.values if bias is None else bias,
        taps,
        taps if conv_bias is None else conv_bias,
        y,
        conv_state,
        step.slots,
    )
    options = {
        "K": taps_width,
        "TAP_MAJOR": is_tap_major(conv_state),
        "HAS_BIAS": bias is not None,
        "HAS_CONV_BIAS": conv_bias is not None,
        "PARTS": x.parts,
        "BLOCK_P": triton.next_power_of_2(max(x.parts, 1)),
        **launch_options(matrix.device),
    }
    if rows <= rows_one_by_one(matrix):
        matvec_in_kernel[(triton.cdiv(width, 4),)](
            *arguments,
            size,
            width,
            dim,
            conv_state.stride(0),
            step.eps,
            ROWS=rows,
            BLOCK_R=triton.next_power_of_2(rows),
            BLOCK_N=4,
            X_ROW=1,
            num_warps=2 * rows,
            **whole_rows(size),
            **options,
        )
        return y
    tile = tile_in(matrix, rows)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.outputs))
    product_in_kernel[grid](
        *arguments,
        rows,
        size,
        width,
        dim,
        conv_state.stride(0),
        step.eps,
        EARLY=rows <= FEW_ROWS,
        BLOCK_B=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        EVEN=size % tile.inputs == 0,
        num_warps=4,
        num_stages=tile.stages,
        **options,
    )
    return y


def project_low(step: Step, xz: Tensor, matrix: Matrix) -> Tensor:
    """x_proj of the first half of xz [B, 2 D]: [B, R + 2 N], in fp32 but of many rows; matrix [R + 2 N, D]."""
    rows, (width, dim) = step.num_rows, matrix.shape
    if step.is_many(dim):
        wide = step_wgmma.tile_low(matrix, rows)
        if wide is not None:
            return sum_shares(share_wide(xz[:, :dim], matrix, wide), xz.dtype)
        if matrix.scales is not None and rows > SOME_ROWS:
            return torch.mm(xz[:, :dim], matrix.transposed(xz.dtype))
        return sum_shares(share_out(xz, matrix, tile_low(matrix, rows), step.counters), xz.dtype)
    if rows <= rows_one_by_one(matrix):
        return multiply_rows(xz, matrix, rows, x_row=2, block=1, warps=8 if dim >= 4096 else 4)
    y = torch.empty((rows, width), dtype=torch.float32, device=matrix.device)
    share_out(xz, matrix, tile_low(matrix, rows), step.counters, y)
    return y


def advance(
    step: Step,
    xz: Tensor,
    low: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    ssm_state: Tensor,
    inner_eps: float | None,
    lag: Lag | None = None,
) -> Tensor:
    """dt_proj, the recurrence and the gate: y [B, D] from xz [B, 2 D] and low [B, R + 2 N].

    With ``lag``, of the layer and for many rows, states are written where their phase has it, and those
    that lack a token get both.
    """
    rows, (dim, rank), states = step.num_rows, (dt_weight.shape[0], dt_weight.shape[1]), A.shape[1]
    y = torch.empty((rows, dim), dtype=xz.dtype, device=xz.device)
    eps = inner_eps or 0.0
    own_delta, is_many = rows <= VERY_FEW_ROWS, step.is_many(dim)
    assert lag is None or is_many, "delta must be given before its bias"
    shape = {"R": rank, "NORM": inner_eps is not None, **launch_options(xz.device)}
    delta = low
    if not own_delta:
        delta = torch.empty((rows, dim), dtype=xz.dtype if is_many else torch.float32, device=xz.device)
        tile = tile_delta(rank, is_many=is_many)
        delta_kernel[(triton.cdiv(dim, tile.outputs), triton.cdiv(rows, tile.rows))](
            low,
            dt_weight,
            dt_bias,
            delta,
            rows,
            dim,
            eps,
            WIDTH=low.shape[1],
            RAW=is_many,
            BLOCK_R=tile.inputs,
            BLOCK_B=tile.rows,
            BLOCK_D=tile.outputs,
            num_warps=4,
            **shape,
        )
    if is_many and fits(A, ssm_state, inner_eps):
        return advance_many(xz, low, delta, dt_bias, A, D, ssm_state, step.slots, lag, launch_options(xz.device))
    block = 32 if own_delta else 64 if is_many else 128
    advance_kernel[(triton.cdiv(dim, block), rows)](
        xz,
        low,
        delta,
        dt_weight,
        dt_bias,
        A,
        D,
        y,
        ssm_state,
        step.slots,
        *((step.slots, y, y) if lag is None else (lag.phases, lag.inputs, lag.b)),
        dim,
        ssm_state.stride(0),
        eps,
        N=states,
        BLOCK_N=triton.next_power_of_2(states),
        OWN_DELTA=own_delta,
        RAW_DELTA=is_many,
        LAGS=lag is not None,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_D=block,
        # as few registers as it can do with: more programs at once
        **({} if lag is None else {"maxnreg": 80}),
        num_warps=2 if is_many else 8 if own_delta and dim >= 4096 else 4,
        **shape,
    )
    return y


def project_out(
    step: Step, y: Tensor, matrix: Matrix, bias: Tensor | None, gain: Tensor, residual: Tensor
) -> tuple[Gained, Tensor]:
    """The norm with ``gain`` of residual [B, H] + out_proj of y [B, D], and that sum, which may be where the residual
    was; matrix [H, D].
    """
    rows, (width, dim) = step.num_rows, matrix.shape
    values = torch.empty((rows, width), dtype=y.dtype, device=matrix.device)
    wide = step_wgmma.tile_out(matrix, rows) if step.is_many(dim) else None
    if wide is not None:
        return _gather(step, share_wide(y, matrix, wide), bias, gain, residual, values), residual
    if rows > rows_of_own(matrix, width):
        product = torch.mm(y, matrix.transposed(y.dtype), out=values)
        return _gather(step, product[None], bias, gain, residual, values), residual
    if rows > FEW_ROWS:
        shares = share_out(y, matrix, tile_out(matrix, rows), step.counters)
        return _gather(step, shares, bias, gain, residual, values), residual
    if rows > rows_one_by_one(matrix):
        return _project_out_rows(step, y, matrix, bias, gain, residual, values), residual
    parts = triton.cdiv(width, 4)
    squares = torch.empty((parts, rows), dtype=torch.float32, device=matrix.device)
    matvec_out_kernel[(parts,)](
        y,
        *matrix.pointers,
        gain if bias is None else bias,
        gain,
        residual,
        values,
        squares,
        dim,
        width,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        BLOCK_R=triton.next_power_of_2(rows),
        BLOCK_N=4,
        num_warps=4,
        **whole_rows(dim),
        **launch_options(matrix.device),
    )
    return Gained(values, squares, parts), residual


def finish(step: Step, x: Gained) -> Tensor:
    """The norm itself: [B, H]."""
    if x.parts == 0:
        return x.values
    y = torch.empty_like(x.values)
    finish_kernel[(step.num_rows,)](
        x.values,
        x.squares,
        y,
        step.num_rows,
        y.shape[1],
        step.eps,
        PARTS=x.parts,
        BLOCK_P=triton.next_power_of_2(x.parts),
        BLOCK_H=triton.next_power_of_2(y.shape[1]),
        num_warps=4,
        **launch_options(y.device),
    )
    return y


def _project_out_rows(
    step: Step, y: Tensor, matrix: Matrix, bias: Tensor | None, gain: Tensor, residual: Tensor, values: Tensor
) -> Gained:
    rows, (width, dim) = step.num_rows, matrix.shape
    tile = tile_out(matrix, rows)
    grid, share = shares_of(tile, rows, width, dim, matrix.device)
    squares = torch.empty((grid[1], rows), dtype=torch.float32, device=matrix.device)
    product_out_kernel[grid](
        y,
        *matrix.pointers,
        gain if bias is None else bias,
        gain,
        residual,
        values,
        squares,
        share,
        step.counters,
        rows,
        dim,
        width,
        HAS_BIAS=bias is not None,
        **tile_options(tile, grid, dim),
        **launch_options(matrix.device),
    )
    return Gained(values, squares, grid[1])


def _gather(step: Step, shares: Tensor, bias: Tensor | None, gain: Tensor, residual: Tensor, values: Tensor) -> Gained:
    """The norm of residual + the sum of shares [shares, B, H], which may be where the values come to be."""
    _, rows, width = shares.shape
    gather_kernel[(rows,)](
        shares,
        gain if bias is None else bias,
        gain,
        residual,
        values,
        rows,
        width,
        step.eps,
        SHARES=shares.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK_H=triton.next_power_of_2(width),
        num_warps=4,
        **launch_options(shares.device),
    )
    return Gained(values, residual, 0)
