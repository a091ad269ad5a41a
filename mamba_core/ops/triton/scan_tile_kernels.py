"""Selective scan, forward, with layouts spelled out: one Gluon kernel, for NVIDIA GPUs.

A channel's states are shared out among GROUPS lanes of one warp, STATES to each: few channels fill the machine as well
as many. A program takes TILE tokens at a time, in three steps:

1. What concerns a token and channel alone, softplus, delta * x and the gate, is computed once, tokens and channels
   shared out among all lanes, and spread to the lanes that need it through shared memory, B and C likewise, in fp32.
2. The recurrence, one token after the other; each lane keeps its share of every output.
3. The shares change places through shared memory and are added up; skip, gate and store.

The inputs of the next tile are on their way meanwhile. All that was read is widened before the next reads start, and
what was just read is left alone until the next tile: else the compiler, which has six scoreboards, lets exponentials
wait for memory.

The special-function units, 4 exponentials per cycle and scheduler, are the limit aimed at, so softplus takes one of
them instead of three and the gate a reciprocal root.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.math import LOG2_E

# what a launch does: whole sequences from and to the state, or their segments in two launches
WHOLE = gl.constexpr(0)
FIRST = gl.constexpr(1)
REST = gl.constexpr(2)


@gluon.jit
def _softplus(v):
    # log1p(e) / e as a polynomial of degree 8 in e = exp(-|v|), in [0, 1]; its greatest relative error is 3e-8
    e = gl.exp2(gl.abs(v) * -LOG2_E)
    p = e * 0.005232552997767925 - 0.029504671692848206
    p = p * e + 0.0782250314950943
    p = p * e - 0.13663166761398315
    p = p * e + 0.19105969369411469
    p = p * e - 0.24842973053455353
    p = p * e + 0.3331909477710724
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return p * e + gl.maximum(v, 0.0)


@gluon.jit
def _silu(v):
    # the square of a reciprocal square root: one instruction and a product where a division takes six
    root = gl.rsqrt(1.0 + gl.exp2(v * -LOG2_E))
    return v * root * root


@gluon.jit
def _pick(tile, token, i):
    """Token ``i`` of ``tile`` [tokens, channels], all of whose tokens lie in registers: the compiler folds the sum."""
    bits = gl.where(token == i, tile.to(gl.int32, bitcast=True), 0)
    return gl.sum(bits, axis=0).to(gl.float32, bitcast=True)


@gluon.jit
def _read(ptr, stride, token, column, left, mask, ALIGN: gl.constexpr):
    """Rows ``token`` [tokens, 1] from ``ptr`` on, ``left`` of which are the sequence's; instead of others, its last."""
    offset = gl.multiple_of(gl.minimum(token, left - 1) * stride, [1, ALIGN])
    return gl.load(ptr + (offset + column), mask=mask, other=0.0)


@gluon.jit
def _entry(entry_ptr, total_ptr, a, n, d, mask, item, segment, dim, N: gl.constexpr):
    """The state a segment starts from: the one after the first segment, decayed, and what those between add."""
    h = gl.load(entry_ptr + item * dim * N + n * dim + d, mask=mask, other=0.0)
    # several at a time, so that their loads wait together
    for first in range(1, segment, 4):
        for k in gl.static_range(4):
            is_before = first + k < segment
            total = gl.load(total_ptr + (item + first + k) * dim + d, mask=(d < dim) & is_before, other=0.0)
            place = (item + first + k) * dim * N + n * dim + d
            added = gl.load(entry_ptr + place, mask=mask & is_before, other=0.0)
            h = gl.exp2(total * a) * h + added
    return h


@gluon.jit
def _walk(
    h,
    a,
    keep_ptrs,
    keep_mask,
    keep_stride,
    position,
    x_ptr,
    dt_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    x_stride,
    dt_stride,
    b_stride,
    c_stride,
    z_stride,
    y_stride,
    dim,
    length,
    N: gl.constexpr,
    GROUPS: gl.constexpr,
    STATES: gl.constexpr,
    WARPS: gl.constexpr,
    TILE: gl.constexpr,
    ALIGN: gl.constexpr,
    CHECKPOINT: gl.constexpr,
    HAS_OUTPUTS: gl.constexpr,
):
    """The state after ``length`` tokens that start at the pointers, and the sum of their delta; their outputs, if
    HAS_OUTPUTS."""
    BLOCK_N: gl.constexpr = GROUPS * STATES
    LANES: gl.constexpr = 32 // GROUPS
    BLOCK_D: gl.constexpr = LANES * WARPS
    # [tokens, states, channels], and with delta and gain in pairs [tokens, states, channels, 2]
    FULL: gl.constexpr = gl.BlockedLayout([1, STATES, 1], [1, GROUPS, LANES], [1, 1, WARPS], [2, 1, 0])
    PAIRED: gl.constexpr = gl.BlockedLayout([1, STATES, 1, 2], [1, GROUPS, LANES, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    ROW_N: gl.constexpr = gl.SliceLayout(2, FULL)
    ROW_D: gl.constexpr = gl.SliceLayout(1, FULL)
    # [tokens, groups, channels]: a lane's shares of the outputs of a tile, and all shares of its outputs
    SHARES: gl.constexpr = gl.BlockedLayout([TILE, 1, 1], [1, GROUPS, LANES], [1, 1, WARPS], [2, 1, 0])
    VECTOR: gl.constexpr = 1 if GROUPS == 1 else min(TILE // GROUPS, BLOCK_D, 4)
    ACROSS: gl.constexpr = min(BLOCK_D // VECTOR, 32)
    ASIDE: gl.constexpr = BLOCK_D // (VECTOR * ACROSS)
    TURNED: gl.constexpr = gl.BlockedLayout(
        [1, GROUPS, VECTOR], [32 // ACROSS, 1, ACROSS], [WARPS // ASIDE, 1, ASIDE], [2, 1, 0]
    )
    # [tokens, channels] as read and written; one lane to a channel has all its tokens
    SPREAD: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [WARPS // ASIDE, ASIDE], [1, 0])
    # [tokens, states] as read
    WIDTH: gl.constexpr = min(BLOCK_N, 4)
    PER_ROW: gl.constexpr = min(BLOCK_N // WIDTH, 32)
    NARROW: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 // PER_ROW, PER_ROW], [WARPS, 1], [1, 0])

    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, SPREAD))[:, None]
    d = gl.program_id(1) * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, SPREAD))[None, :]
    mask_d = d < dim
    bias = gl.load(bias_ptr + d, mask=mask_d, other=0.0).to(gl.float32)
    skip = gl.load(d_ptr + d, mask=mask_d, other=0.0).to(gl.float32)
    narrow_t = gl.arange(0, TILE, layout=gl.SliceLayout(1, NARROW))[:, None]
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, NARROW))[None, :]
    mask_n = n < N
    share_t = gl.arange(0, TILE, layout=gl.SliceLayout(1, gl.SliceLayout(2, SHARES)))[:, None, None]

    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    shared_b = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK_N], PLAIN)
    if GROUPS > 1:
        PLAIN_PAIRS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
        shared_pair = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK_D, 2], PLAIN_PAIRS)
    if HAS_OUTPUTS:
        shared_c = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK_N], PLAIN)
    total = gl.zeros([TILE, BLOCK_D], gl.float32, layout=SPREAD)

    next_x = _read(x_ptr, x_stride, t, d, length, mask_d, ALIGN)
    next_dt = _read(dt_ptr, dt_stride, t, d, length, mask_d, ALIGN)
    next_b = _read(b_ptr, b_stride, narrow_t, n, length, mask_n, ALIGN)
    if HAS_OUTPUTS:
        next_z = _read(z_ptr, z_stride, t, d, length, mask_d, ALIGN)
        next_c = _read(c_ptr, c_stride, narrow_t, n, length, mask_n, ALIGN)
    for first in range(0, length, TILE):
        left = length - first
        x = next_x.to(gl.float32)
        dt = next_dt.to(gl.float32) + bias
        b = next_b.to(gl.float32)
        x_ptr += TILE * x_stride
        dt_ptr += TILE * dt_stride
        b_ptr += gl.multiple_of(TILE * b_stride, ALIGN)
        next_x = _read(x_ptr, x_stride, t, d, left - TILE, mask_d, ALIGN)
        next_dt = _read(dt_ptr, dt_stride, t, d, left - TILE, mask_d, ALIGN)
        next_b = _read(b_ptr, b_stride, narrow_t, n, left - TILE, mask_n, ALIGN)
        if HAS_OUTPUTS:
            z = next_z.to(gl.float32)
            c = next_c.to(gl.float32)
            z_ptr += TILE * z_stride
            c_ptr += gl.multiple_of(TILE * c_stride, ALIGN)
            next_z = _read(z_ptr, z_stride, t, d, left - TILE, mask_d, ALIGN)
            next_c = _read(c_ptr, c_stride, narrow_t, n, left - TILE, mask_n, ALIGN)

        # a delta of zero leaves the state as it is
        delta = gl.where(t < left, _softplus(dt), 0.0)
        gain = delta * x
        if GROUPS > 1:
            shared_pair.store(gl.join(delta, gain))
        shared_b.store(b)
        if HAS_OUTPUTS:
            shared_c.store(c)
            shares = gl.zeros([TILE, GROUPS, BLOCK_D], gl.float32, layout=SHARES)
        else:
            total += delta

        for i in gl.static_range(TILE):
            if CHECKPOINT > 0 and i % CHECKPOINT == 0:
                at = position + first + i
                if at % CHECKPOINT == 0 and i < left:
                    gl.store(keep_ptrs + at // CHECKPOINT * keep_stride, h, mask=keep_mask)
            if GROUPS > 1:
                delta_i, gain_i = gl.split(shared_pair.slice(i, 1).load(gl.SliceLayout(1, PAIRED)))
                delta_i = gl.convert_layout(delta_i, ROW_D)
                gain_i = gl.convert_layout(gain_i, ROW_D)
            else:
                delta_i = gl.convert_layout(_pick(delta, t, i), gl.SliceLayout(0, ROW_D))[None, :]
                gain_i = gl.convert_layout(_pick(gain, t, i), gl.SliceLayout(0, ROW_D))[None, :]
            b_i = shared_b.slice(i, 1).load(ROW_N)
            h = gl.exp2(delta_i[:, None, :] * a) * h + gain_i[:, None, :] * b_i[:, :, None]
            if HAS_OUTPUTS:
                c_i = shared_c.slice(i, 1).load(ROW_N)
                # over the lane's own states alone
                share = gl.sum(gl.reshape(h * c_i[:, :, None], [1, GROUPS, STATES, BLOCK_D]), axis=2)
                shares = gl.where(share_t == i, gl.convert_layout(share, SHARES), shares)

        if HAS_OUTPUTS:
            y = gl.convert_layout(gl.sum(gl.convert_layout(shares, TURNED), axis=1), SPREAD)
            y = (y + skip * x) * _silu(z)
            offset = gl.multiple_of(t * y_stride, [1, ALIGN]) + d
            gl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=(t < left) & mask_d)
            y_ptr += TILE * y_stride
    return h, gl.convert_layout(gl.sum(total, axis=0), gl.SliceLayout(0, ROW_D))


@gluon.jit(do_not_specialize=["slots_ptr", "num_segments", "segment_size"])
def scan_tile_kernel(
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
    total_ptr,
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
    dim,
    num_segments,
    segment_size,
    N: gl.constexpr,
    GROUPS: gl.constexpr,
    STATES: gl.constexpr,
    WARPS: gl.constexpr,
    TILE: gl.constexpr,
    ALIGN: gl.constexpr,
    CHECKPOINT: gl.constexpr,
    WORK: gl.constexpr,
):
    """One sequence, or a segment of one (program 0), 32 / GROUPS * WARPS channels (program 1).

    WHOLE: from and to the state. Else of each sequence's segments, two or more, a launch takes all but one,
    num_segments of them. FIRST, all but the last: the first one's outputs and the state after it, and for each of
    the others what it adds to the state, both in ``entry`` [rows * num_segments, N, D], and the sum of its delta,
    in ``total`` [rows * num_segments, D]. REST, all but the first: from those their outputs, and the last state.

    ALIGN divides the strides of all rows. With CHECKPOINT > 0, a power of two, the state before every CHECKPOINT-th
    token of a sequence is kept, in ``checkpoint`` [entries, channel groups, N, 32].
    """
    BLOCK_N: gl.constexpr = GROUPS * STATES
    BLOCK_D: gl.constexpr = 32 // GROUPS * WARPS
    FULL: gl.constexpr = gl.BlockedLayout([1, STATES, 1], [1, GROUPS, 32 // GROUPS], [1, 1, WARPS], [2, 1, 0])

    item = gl.program_id(0).to(gl.int64)
    row = item // num_segments
    segment = (item % num_segments).to(gl.int32)
    if WORK == REST:
        segment += 1
    begin = gl.load(cu_seqlens_ptr + row).to(gl.int64)
    position = segment.to(gl.int64) * segment_size
    left = gl.load(cu_seqlens_ptr + row + 1) - begin - position
    is_last = left <= segment_size
    length = gl.minimum(left, segment_size).to(gl.int32)
    if WORK == FIRST:
        length = gl.where(is_last & (segment > 0), 0, length)
    if length <= 0:
        return

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, FULL)))[None, :, None]
    flat_d = gl.program_id(1) * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, gl.SliceLayout(1, FULL)))
    d = flat_d[None, None, :]
    mask = (n < N) & (d < dim)
    a = gl.load(a_ptr + d * N + n, mask=mask, other=0.0).to(gl.float32) * LOG2_E
    home = state_ptr + gl.load(slots_ptr + row).to(gl.int64) * state_stride + d * N + n
    entry = entry_ptr + item * dim * N + n * dim + d
    keep_stride = (dim + 31) // 32 * (N * 32)
    keep_ptrs = checkpoint_ptr + (begin // CHECKPOINT + row) * keep_stride if CHECKPOINT > 0 else checkpoint_ptr
    keep_ptrs += (d // 32) * (N * 32) + n * 32 + d % 32
    start = begin + position
    x_ptr += start * x_stride
    dt_ptr += start * dt_stride
    b_ptr += gl.multiple_of(start * b_stride, ALIGN)
    c_ptr += gl.multiple_of(start * c_stride, ALIGN)
    z_ptr += start * z_stride
    y_ptr += start * y_stride

    if WORK == REST:
        h = _entry(entry_ptr, total_ptr, a, n, d, mask, item - segment + 1, segment, dim, N)
    else:
        h = gl.load(home, mask=mask & (segment == 0), other=0.0).to(gl.float32)
    if WORK == FIRST and segment > 0:
        h, total = _walk(
            h, a, keep_ptrs, mask, keep_stride, position,
            x_ptr, dt_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, y_ptr,
            x_stride, dt_stride, b_stride, c_stride, z_stride, y_stride,
            dim, length, N, GROUPS, STATES, WARPS, TILE, ALIGN, 0, False,
        )  # fmt: skip
        gl.store(total_ptr + item * dim + flat_d, total, mask=flat_d < dim)
    else:
        h, total = _walk(
            h, a, keep_ptrs, mask, keep_stride, position,
            x_ptr, dt_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, y_ptr,
            x_stride, dt_stride, b_stride, c_stride, z_stride, y_stride,
            dim, length, N, GROUPS, STATES, WARPS, TILE, ALIGN, CHECKPOINT, True,
        )  # fmt: skip
    if WORK == WHOLE or is_last:
        gl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask)
    elif WORK == FIRST:
        gl.store(entry, h, mask=mask)
