"""Selective scan, forward: Triton kernels.

A program owns BLOCK_D = 32 * num_warps channels of one sequence (or of one segment of it) and all their states, one
channel per thread (see ``tiles``). ALIGN divides the row strides of B and C: their rows are then read in wide loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.math import LOG2_E, sigmoid, softplus
from mamba_core.ops.triton.tiles import group_offset, load_states, store_states


@triton.jit(do_not_specialize=["slots_ptr", "num_tokens", "num_segments", "segment_size", "nothing"])
def scan_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    state_ptr,
    entry_ptr,
    checkpoint_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    x_stride,
    dt_stride,
    b_stride,
    c_stride,
    z_stride,
    y_stride,
    state_stride,
    num_tokens,
    dim,
    num_segments,
    segment_size,
    nothing,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    CHECKPOINT: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Outputs of one segment: from ``entry`` [rows * segments, D, N] if segmented, else from and to the state.

    With CHECKPOINT > 0 the state before every CHECKPOINT-th token of a sequence is kept for the backward pass, in
    ``checkpoint`` [entries, channel groups, N, 32].
    """
    item = tl.program_id(0).to(tl.int64)
    row = item // num_segments
    segment = item % num_segments
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    mask_d = d < dim
    mask_n = n < N
    mask = mask_n[:, None] & mask_d[None, :]

    begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
    first = begin + segment * segment_size
    length = tl.minimum(end - first, segment_size).to(tl.int32)

    if SEGMENTED:  # noqa: SIM108  two pointer types
        home_ptr = entry_ptr + item * dim * N
    else:
        home_ptr = state_ptr + tl.load(slots_ptr + row) * state_stride
    h = load_states(home_ptr, n, d, mask_d, N, BLOCK_N, BLOCK_D)
    a = load_states(a_ptr, n, d, mask_d, N, BLOCK_N, BLOCK_D) * LOG2_E
    skip = tl.load(d_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)

    # the inputs of the next token are fetched before the store of this one, which would otherwise hold them back; an
    # empty sequence or segment reads some token too, and the last token is read twice, so that no read is masked
    t = tl.minimum(first, num_tokens - 1)
    next_x = tl.load(x_ptr + t * x_stride + d, mask=mask_d, other=0.0)
    next_dt = tl.load(dt_ptr + t * dt_stride + d, mask=mask_d, other=0.0)
    next_z = tl.load(z_ptr + t * z_stride + d, mask=mask_d, other=0.0)
    next_b = tl.load(b_ptr + tl.multiple_of(t * b_stride, ALIGN) + n, mask=mask_n, other=0.0)
    next_c = tl.load(c_ptr + tl.multiple_of(t * c_stride, ALIGN) + n, mask=mask_n, other=0.0)
    for i in range(0, length):
        x = next_x.to(tl.float32)
        delta = softplus(next_dt.to(tl.float32) + bias)
        z = next_z.to(tl.float32)
        b = next_b.to(tl.float32)
        c = next_c.to(tl.float32)
        t = first + tl.minimum(i + 1, length - 1)
        next_x = tl.load(x_ptr + t * x_stride + d, mask=mask_d, other=0.0)
        next_dt = tl.load(dt_ptr + t * dt_stride + d, mask=mask_d, other=0.0)
        next_z = tl.load(z_ptr + t * z_stride + d, mask=mask_d, other=0.0)
        next_b = tl.load(b_ptr + tl.multiple_of(t * b_stride, ALIGN) + n, mask=mask_n, other=0.0)
        next_c = tl.load(c_ptr + tl.multiple_of(t * c_stride, ALIGN) + n, mask=mask_n, other=0.0)

        if CHECKPOINT > 0:
            position = segment * segment_size + i
            if position % CHECKPOINT == 0:
                index = begin // CHECKPOINT + row + position // CHECKPOINT
                keep_ptr = checkpoint_ptr + index * tl.cdiv(dim, 32) * (N * 32)
                tl.store(keep_ptr + (group_offset(d, N) + nothing)[None, :] + (n * 32)[:, None], h, mask=mask)
        h = tl.exp2(delta[None, :] * a) * h + (delta * x)[None, :] * b[:, None]
        y = tl.sum(h * c[:, None], axis=0) + skip * x
        y = y * (z * sigmoid(z))
        tl.store(y_ptr + (first + i) * y_stride + d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
    if not SEGMENTED:
        store_states(home_ptr, h, n, d, mask_d, N)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "segment_size"])
def scan_segment_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    entry_ptr,
    total_ptr,
    cu_seqlens_ptr,
    x_stride,
    dt_stride,
    b_stride,
    num_tokens,
    dim,
    num_segments,
    segment_size,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What one segment adds to the state: its last state from zero, in ``entry`` [rows * segments, D, N], and the
    sum of its delta, in ``total`` [rows * segments, D], whose product with A is the log of the segment's decay."""
    item = tl.program_id(0).to(tl.int64)
    row = item // num_segments
    segment = item % num_segments
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    mask_d = d < dim
    mask_n = n < N

    begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
    first = begin + segment * segment_size
    length = tl.minimum(end - first, segment_size).to(tl.int32)

    a = load_states(a_ptr, n, d, mask_d, N, BLOCK_N, BLOCK_D) * LOG2_E
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    t = tl.minimum(first, num_tokens - 1)
    next_x = tl.load(x_ptr + t * x_stride + d, mask=mask_d, other=0.0)
    next_dt = tl.load(dt_ptr + t * dt_stride + d, mask=mask_d, other=0.0)
    next_b = tl.load(b_ptr + tl.multiple_of(t * b_stride, ALIGN) + n, mask=mask_n, other=0.0)
    for i in range(0, length):
        x = next_x.to(tl.float32)
        delta = softplus(next_dt.to(tl.float32) + bias)
        b = next_b.to(tl.float32)
        t = first + tl.minimum(i + 1, length - 1)
        next_x = tl.load(x_ptr + t * x_stride + d, mask=mask_d, other=0.0)
        next_dt = tl.load(dt_ptr + t * dt_stride + d, mask=mask_d, other=0.0)
        next_b = tl.load(b_ptr + tl.multiple_of(t * b_stride, ALIGN) + n, mask=mask_n, other=0.0)
        h = tl.exp2(delta[None, :] * a) * h + (delta * x)[None, :] * b[:, None]
        total += delta
    store_states(entry_ptr + item * dim * N, h, n, d, mask_d, N)
    tl.store(total_ptr + item * dim + d, total, mask=mask_d)


@triton.jit(do_not_specialize=["slots_ptr", "num_segments", "segment_size"])
def scan_carry_kernel(
    a_ptr,
    state_ptr,
    entry_ptr,
    total_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    state_stride,
    dim,
    num_segments,
    segment_size,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry the state through the segments of one sequence, over flat (channel, state) elements.

    Replaces what each segment adds by the state it starts from, and leaves the last state in the slot.
    """
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = element // N
    mask = d < dim
    begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
    count = ((end - begin + segment_size - 1) // segment_size).to(tl.int32)
    home = state_ptr + tl.load(slots_ptr + row) * state_stride + element
    h = tl.load(home, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + element, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    entry_ptrs = entry_ptr + row * num_segments * dim * N + element
    total_ptrs = total_ptr + row * num_segments * dim + d
    for _ in range(0, count):
        added = tl.load(entry_ptrs, mask=mask, other=0.0)
        total = tl.load(total_ptrs, mask=mask, other=0.0)
        tl.store(entry_ptrs, h, mask=mask)
        h = tl.exp2(total * a) * h + added
        entry_ptrs += dim * N
        total_ptrs += dim
    tl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots_ptr"])
def scan_step_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    state_ptr,
    slots_ptr,
    x_stride,
    dt_stride,
    b_stride,
    c_stride,
    z_stride,
    y_stride,
    state_stride,
    dim,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token of one row. Tiles are [BLOCK_D, BLOCK_N]: here the state's bytes are the cost, so it is read wide."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    mask_d = d < dim
    mask_n = n < N
    mask = mask_d[:, None] & mask_n[None, :]
    tile = d[:, None] * N + n[None, :]
    home = state_ptr + tl.load(slots_ptr + row) * state_stride + tile
    h = tl.load(home, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + tile, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    x = tl.load(x_ptr + row * x_stride + d, mask=mask_d, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + row * dt_stride + d, mask=mask_d, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_stride + d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    skip = tl.load(d_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + n, mask=mask_n, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + row * c_stride + n, mask=mask_n, other=0.0).to(tl.float32)
    delta = softplus(dt + bias)
    h = tl.exp2(delta[:, None] * a) * h + (delta * x)[:, None] * b[None, :]
    tl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask)
    y = tl.sum(h * c[None, :], axis=1) + skip * x
    y = y * (z * sigmoid(z))
    tl.store(y_ptr + row * y_stride + d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
