"""Selective scan on the GPU: how many programs, which kernels, what is kept for the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_core.ops.packing import Packing
from mamba_core.ops.triton.devices import compiles_for_nvidia
from mamba_core.ops.triton.layout import as_rows, check_state
from mamba_core.ops.triton.scan_backward_kernels import scan_backward_kernel
from mamba_core.ops.triton.scan_kernels import scan_carry_kernel, scan_kernel, scan_segment_kernel, scan_step_kernel
from mamba_core.ops.triton.scan_tile_kernels import FIRST, REST, WHOLE, scan_tile_kernel

# one channel per thread: the kernels' layout needs block = 32 * warps
_WARPS = 2
_BLOCK_D = 32 * _WARPS
_BACKWARD_BLOCK_D = 32
# lets twelve warps share a multiprocessor, at the price of a few spilled bytes
_BACKWARD_REGISTERS = 168
_CARRY_BLOCK = 128
_STEP_BLOCK_D = 64
# tokens between kept states: the recomputed states of one chunk should fit the L2 cache for all programs together
_CHECKPOINT = 16
# programs below which sequences are cut into segments, how many are then wanted, and a segment's least length
_ENOUGH_PROGRAMS = 512
_WANTED_PROGRAMS = 2048
_LEAST_SEGMENT = 32
_MOST_REGISTERS = 255
# sixteen lanes to a channel, sixteen states to a lane
_MOST_STATES_IN_TILES = 256
# rows walked at once in the backward pass: bounds the scratch memory
_BACKWARD_ROWS = 256


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    packing: Packing,
) -> Tensor:
    """See ``mamba_core.ops.selective_scan``."""
    check_state(state)
    if packing.num_tokens == 0:
        return torch.empty_like(x)
    inputs = tuple(as_rows(t) for t in (x, dt, A.contiguous(), B, C, D, z, dt_bias))
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _SelectiveScan.apply(*inputs, state, packing)
    return _forward(inputs, state, packing, None)


def segment_length(packing: Packing, dim: int) -> int:
    """Tokens per segment: the longest sequence if there are programs enough without cutting sequences up."""
    programs = packing.num_rows * triton.cdiv(dim, _BLOCK_D)
    if programs >= _ENOUGH_PROGRAMS:
        return packing.max_seqlen
    segments = triton.cdiv(_WANTED_PROGRAMS, programs)
    length = triton.cdiv(triton.cdiv(packing.max_seqlen, segments), _LEAST_SEGMENT) * _LEAST_SEGMENT
    return length if 2 * length <= packing.max_seqlen else packing.max_seqlen


def _forward(inputs: tuple[Tensor, ...], state: Tensor, packing: Packing, checkpoint: Tensor | None) -> Tensor:
    x, dt, A, B, C, D, z, dt_bias = inputs
    dim, num_states = A.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if has_tiles(x, num_states):
        _forward_in_tiles(inputs, y, state, packing, checkpoint)
        return y
    length = segment_length(packing, dim)
    segments = triton.cdiv(packing.max_seqlen, length)
    entry = _segment_entries(inputs, state, packing, segments, length) if segments > 1 else y
    scan_kernel[(packing.num_rows * segments, triton.cdiv(dim, _BLOCK_D))](
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        y,
        state,
        entry,
        y if checkpoint is None else checkpoint,
        packing.slots,
        packing.cu_seqlens,
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        C.stride(0),
        z.stride(0),
        y.stride(0),
        state.stride(0),
        packing.num_tokens,
        dim,
        segments,
        length,
        0,
        N=num_states,
        BLOCK_N=triton.next_power_of_2(num_states),
        BLOCK_D=_BLOCK_D,
        ALIGN=math.gcd(B.stride(0), C.stride(0), 16),
        CHECKPOINT=0 if checkpoint is None else _CHECKPOINT,
        SEGMENTED=segments > 1,
        num_warps=_WARPS,
    )
    return y


def has_tiles(x: Tensor, num_states: int) -> bool:
    """Whether ``scan_tile_kernel`` serves: it is written for warps of 32 lanes, and cannot be interpreted."""
    return compiles_for_nvidia(x.device) and num_states <= _MOST_STATES_IN_TILES


@dataclass(frozen=True, slots=True)
class Tiling:
    """How ``scan_tile_kernel`` shares out its work: lanes per channel, warps per program, tokens taken at a time, and
    the registers a thread may have."""

    groups: int
    warps: int
    tile: int
    registers: int


# by the channels at work at once from which on they serve best
_TILINGS = {65536: Tiling(1, 1, 8, 128), 8192: Tiling(4, 4, 16, 96), 0: Tiling(8, 4, 32, 128)}
# and for long sequences of few channels, which are cut up: up to how many channels, from which length on, and how
_SEGMENT_TILING = Tiling(4, 2, 16, 128)
_FEW_STREAMS, _LEAST_CUT_UP, _SEGMENTS = 2048, 2048, 9


def choose_tiling(packing: Packing, dim: int, num_states: int) -> tuple[Tiling, int]:
    """A tiling, and the tokens of a segment: the longest sequence's unless channels are few and sequences long.

    As few lanes per channel as fill the machine, since each more costs exchange. Segments cost every exponential
    twice, but for the first and the last: they gain a tenth where whole sequences leave half the machine idle.
    """
    # channels of all sequences at work at once, on average until the longest is done
    streams = dim * packing.num_tokens / packing.max_seqlen * packing.num_beside
    if streams <= _FEW_STREAMS and packing.max_seqlen >= _LEAST_CUT_UP:
        tiling = _with_room(_SEGMENT_TILING, num_states)
        return tiling, triton.cdiv(triton.cdiv(packing.max_seqlen, _SEGMENTS), tiling.tile) * tiling.tile
    tiling = next(tiling for least, tiling in _TILINGS.items() if streams >= least)
    return _with_room(tiling, num_states), packing.max_seqlen


def _with_room(tiling: Tiling, num_states: int) -> Tiling:
    """The tiling, or one like it whose lanes have one state at least and no more than their registers hold."""
    block_n = triton.next_power_of_2(num_states)
    groups = min(max(tiling.groups, block_n // 16), block_n)
    if groups == tiling.groups and block_n // groups <= 16 // tiling.groups:
        return tiling
    return Tiling(groups, 1, max(groups, 4), _MOST_REGISTERS)


def states_per_lane(tiling: Tiling, num_states: int) -> int:
    return int(triton.next_power_of_2(num_states)) // tiling.groups


def _forward_in_tiles(
    inputs: tuple[Tensor, ...], y: Tensor, state: Tensor, packing: Packing, checkpoint: Tensor | None
) -> None:
    x, _, A, *_ = inputs
    dim, num_states = A.shape
    tiling, length = choose_tiling(packing, dim, num_states)
    segments = triton.cdiv(packing.max_seqlen, length)
    launch = _TileLaunch(inputs, y, state, packing, checkpoint, tiling, segments, length)
    if segments == 1:
        launch(WHOLE.value, y, y)
        return
    items = packing.num_rows * (segments - 1)
    entry = torch.empty((items, num_states, dim), dtype=torch.float32, device=x.device)
    total = torch.empty((items, dim), dtype=torch.float32, device=x.device)
    launch(FIRST.value, entry, total)
    launch(REST.value, entry, total)


@dataclass(frozen=True, slots=True)
class _TileLaunch:
    """A call of ``scan_tile_kernel`` but for which part of the work, and what passes between the parts."""

    inputs: tuple[Tensor, ...]
    y: Tensor
    state: Tensor
    packing: Packing
    checkpoint: Tensor | None
    tiling: Tiling
    segments: int
    length: int

    def __call__(self, work: int, entry: Tensor, total: Tensor) -> None:
        x, dt, A, B, C, _, z, _ = self.inputs
        dim, num_states = A.shape
        strides = (x.stride(0), dt.stride(0), B.stride(0), C.stride(0), z.stride(0), self.y.stride(0))
        tiling, packing = self.tiling, self.packing
        # each launch leaves one segment to the other, but for a whole sequence
        segments_at_once = max(self.segments - 1, 1)
        block_d = tiling.warps * 32 // tiling.groups
        scan_tile_kernel[(packing.num_rows * segments_at_once, triton.cdiv(dim, block_d))](
            *self.inputs,
            self.y,
            self.state,
            entry,
            total,
            self.y if self.checkpoint is None else self.checkpoint,
            packing.slots,
            packing.cu_seqlens,
            *strides,
            self.state.stride(0),
            dim,
            segments_at_once,
            self.length,
            N=num_states,
            GROUPS=tiling.groups,
            STATES=states_per_lane(tiling, num_states),
            WARPS=tiling.warps,
            TILE=tiling.tile,
            ALIGN=math.gcd(*strides, 16),
            CHECKPOINT=0 if self.checkpoint is None else _CHECKPOINT,
            WORK=work,
            num_warps=tiling.warps,
            maxnreg=tiling.registers,
        )


def _segment_entries(inputs: tuple[Tensor, ...], state: Tensor, packing: Packing, segments: int, length: int) -> Tensor:
    """The state each segment starts from, [rows * segments, D, N] fp32; the last states are left in their slots."""
    x, dt, A, B, _, _, _, dt_bias = inputs
    dim, num_states = A.shape
    items = packing.num_rows * segments
    entry = torch.empty((items, dim, num_states), dtype=torch.float32, device=x.device)
    total = torch.empty((items, dim), dtype=torch.float32, device=x.device)
    scan_segment_kernel[(items, triton.cdiv(dim, _BLOCK_D))](
        x,
        dt,
        A,
        B,
        dt_bias,
        entry,
        total,
        packing.cu_seqlens,
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        packing.num_tokens,
        dim,
        segments,
        length,
        N=num_states,
        BLOCK_N=triton.next_power_of_2(num_states),
        BLOCK_D=_BLOCK_D,
        ALIGN=math.gcd(B.stride(0), 16),
        num_warps=_WARPS,
    )
    scan_carry_kernel[(packing.num_rows, triton.cdiv(dim * num_states, _CARRY_BLOCK))](
        A,
        state,
        entry,
        total,
        packing.slots,
        packing.cu_seqlens,
        state.stride(0),
        dim,
        segments,
        length,
        N=num_states,
        BLOCK=_CARRY_BLOCK,
        num_warps=4,
    )
    return entry


class _SelectiveScan(torch.autograd.Function):
    """Keeps the inputs and the state before every ``_CHECKPOINT``-th token; the states between are recomputed."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, state, packing = args
        _, _, A, *_ = inputs
        # sequence b's checkpoints begin at entry begin // _CHECKPOINT + b, which leaves room for each without a sum
        count = packing.num_tokens // _CHECKPOINT + packing.num_rows
        checkpoint = torch.empty(
            (count, triton.cdiv(A.shape[0], 32), A.shape[1], 32), dtype=torch.float32, device=A.device
        )
        y = _forward(tuple(inputs), state, packing, checkpoint)
        ctx.save_for_backward(*inputs, checkpoint)
        ctx.packing = packing
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, checkpoint = ctx.saved_tensors
        return *_backward(tuple(inputs), checkpoint, ctx.packing, as_rows(dy)), None, None


def _backward(inputs: tuple[Tensor, ...], checkpoint: Tensor, packing: Packing, dy: Tensor) -> tuple[Tensor, ...]:
    x, dt, A, B, C, D, z, dt_bias = inputs
    dim, num_states = A.shape
    block_n = triton.next_power_of_2(num_states)
    blocks = triton.cdiv(dim, _BACKWARD_BLOCK_D)
    programs = min(packing.num_rows, _BACKWARD_ROWS)

    def partial(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    dx, ddt, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, z))
    db, dc = (partial(blocks, packing.num_tokens, num_states) for _ in range(2))
    da, dd, dbias = partial(programs, dim, num_states), partial(programs, dim), partial(programs, dim)
    scan_backward_kernel[(programs, blocks)](
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dy,
        checkpoint,
        partial(programs, blocks, _CHECKPOINT, block_n, _BACKWARD_BLOCK_D),
        packing.cu_seqlens,
        dx,
        ddt,
        dz,
        db,
        dc,
        da,
        dd,
        dbias,
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        C.stride(0),
        z.stride(0),
        dy.stride(0),
        packing.num_tokens,
        packing.num_rows,
        dim,
        0,
        N=num_states,
        BLOCK_N=block_n,
        BLOCK_D=_BACKWARD_BLOCK_D,
        ALIGN=math.gcd(B.stride(0), C.stride(0), 16),
        CHECKPOINT=_CHECKPOINT,
        num_warps=_BACKWARD_BLOCK_D // 32,
        maxnreg=_BACKWARD_REGISTERS,
    )
    sums = ((da, A), (db, B), (dc, C), (dd, D), (dbias, dt_bias))
    ga, gb, gc, gd, gbias = (p.sum(0).to(t.dtype) for p, t in sums)
    return dx, ddt, ga, gb, gc, gd, dz, gbias


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """See ``mamba_core.ops.selective_scan_step``."""
    check_state(state)
    x, dt, A, B, C, z = (as_rows(t) for t in (x, dt, A.contiguous(), B, C, z))
    dim, num_states = A.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scan_step_kernel[(x.shape[0], triton.cdiv(dim, _STEP_BLOCK_D))](
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        y,
        state,
        slots,
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        C.stride(0),
        z.stride(0),
        y.stride(0),
        state.stride(0),
        dim,
        N=num_states,
        BLOCK_N=triton.next_power_of_2(num_states),
        BLOCK_D=_STEP_BLOCK_D,
        num_warps=4,
    )
    return y
