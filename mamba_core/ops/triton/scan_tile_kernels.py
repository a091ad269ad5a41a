"""Selective scan, forward, with layouts spelled out: one Gluon kernel, for NVIDIA GPUs.

A channel's states are shared out among GROUPS lanes of one warp, STATES to each, and a lane has CHANNELS channels: few
channels fill the machine as well as many, and what a lane reads of B and C serves all its channels. A program takes
TILE tokens at a time, in three steps:

1. What concerns a token and channel alone, softplus, delta * x and the gate, is computed once, tokens shared out among
   the lanes, and spread to the lanes that need it through shared memory, B and C likewise, in fp32.
2. The recurrence, one token after the other; the lanes of a channel add up their shares of each output.
3. Skip, gate and store, again with the tokens shared out among the lanes.

The inputs of the next tile are on their way meanwhile. The special-function units, 4 exponentials per cycle and
scheduler, are the limit aimed at, so softplus takes one of them instead of three and the gate a reciprocal root.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mamba_core.ops.triton.math import LOG2_E

# what a launch does: whole sequences from and to the state, or their segments in two launches
WHOLE = gl.constexpr(0)
ADDED = gl.constexpr(1)
OUTPUTS = gl.constexpr(2)


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
def _entry(entry_ptr, total_ptr, a, n, d, mask, row_item, segment, dim, N: gl.constexpr):
    """The state a segment starts from: what the state and the segments before it add, decayed."""
    h = gl.load(entry_ptr + row_item * dim * N + n * dim + d, mask=mask, other=0.0)
    # several at a time, so that their loads wait together
    for first in range(0, segment, 4):
        for k in gl.static_range(4):
            item = row_item + first + k
            is_before = first + k < segment
            total = gl.load(total_ptr + item * dim + d, mask=(d < dim) & is_before, other=0.0)
            added = gl.load(entry_ptr + (item + 1) * dim * N + n * dim + d, mask=mask & is_before, other=0.0)
            h = gl.exp2(total * a) * h + added
    return h


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
    CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
    TILE: gl.constexpr,
    ALIGN: gl.constexpr,
    CHECKPOINT: gl.constexpr,
    WORK: gl.constexpr,
    LONG: gl.constexpr,
):
    """One segment of one sequence (program 0), CHANNELS * 32 / GROUPS * WARPS channels (program 1).

    WHOLE: from and to the state; num_segments is 1. ADDED: what each segment but the last adds to the state, in
    ``entry`` [rows * segments, N, D] one further on, where the first entry is the state itself, and the sum of its
    delta, in ``total`` [rows * segments, D]. OUTPUTS: from those the outputs, and the last state in its slot.

    ALIGN divides the row strides of B and C; LONG says that offsets within a segment may not fit 32 bits. With
    CHECKPOINT > 0, a power of two, the state before every CHECKPOINT-th token of a sequence is kept, in
    ``checkpoint`` [entries, channel groups, N, 32].
    """
    BLOCK_N: gl.constexpr = GROUPS * STATES
    LANES: gl.constexpr = 32 // GROUPS
    BLOCK_D: gl.constexpr = CHANNELS * LANES * WARPS
    # [tokens, states, channels]
    FULL: gl.constexpr = gl.BlockedLayout([1, STATES, CHANNELS], [1, GROUPS, LANES], [1, 1, WARPS], [2, 1, 0])
    ROW_N: gl.constexpr = gl.SliceLayout(2, FULL)
    ROW_D: gl.constexpr = gl.SliceLayout(1, FULL)
    # [tokens, channels], the tokens shared out among the lanes that share a channel
    SPREAD: gl.constexpr = gl.BlockedLayout([1, CHANNELS], [GROUPS, LANES], [1, WARPS], [1, 0])
    # [tokens, states] as loaded
    WIDTH: gl.constexpr = 4 if BLOCK_N >= 4 else BLOCK_N
    PER_ROW: gl.constexpr = BLOCK_N // WIDTH if BLOCK_N // WIDTH < 32 else 32
    NARROW: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 // PER_ROW, PER_ROW], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    item = gl.program_id(0)
    row = item // num_segments
    segment = item % num_segments
    begin = gl.load(cu_seqlens_ptr + row).to(gl.int64)
    left = gl.load(cu_seqlens_ptr + row + 1).to(gl.int64) - begin - segment.to(gl.int64) * segment_size
    is_last = left <= segment_size
    length = gl.minimum(left, segment_size).to(gl.int32)
    if WORK == ADDED:
        length = gl.where(is_last, 0, length)
    if length <= 0:
        return
    item = item.to(gl.int64)
    start = begin + segment.to(gl.int64) * segment_size

    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ROW_N))[None, :, None]
    channel = (gl.program_id(1) * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROW_D)))[None, None, :]
    mask = (n < N) & (channel < dim)
    a = gl.load(a_ptr + channel * N + n, mask=mask, other=0.0).to(gl.float32) * LOG2_E
    home = state_ptr + gl.load(slots_ptr + row).to(gl.int64) * state_stride + channel * N + n
    if WORK == WHOLE:
        h = gl.load(home, mask=mask, other=0.0).to(gl.float32)
    elif WORK == ADDED:
        if segment == 0:
            old = gl.load(home, mask=mask, other=0.0).to(gl.float32)
            gl.store(entry_ptr + item * dim * N + n * dim + channel, old, mask=mask)
        h = gl.zeros([1, BLOCK_N, BLOCK_D], gl.float32, layout=FULL)
    else:
        h = _entry(entry_ptr, total_ptr, a, n, channel, mask, item - segment, segment, dim, N)
        # a sequence of one segment adds nothing, and no other program touches its state
        if is_last and segment == 0:
            h = gl.load(home, mask=mask, other=0.0).to(gl.float32)

    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, SPREAD))[:, None]
    d = (gl.program_id(1) * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, SPREAD)))[None, :]
    mask_d = d < dim
    bias = gl.load(bias_ptr + d, mask=mask_d, other=0.0).to(gl.float32)
    skip = gl.load(d_ptr + d, mask=mask_d, other=0.0).to(gl.float32)
    narrow_t = gl.arange(0, TILE, layout=gl.SliceLayout(1, NARROW))[:, None]
    narrow_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, NARROW))[None, :]
    mask_n = narrow_n < N
    x_ptr += start * x_stride
    dt_ptr += start * dt_stride
    b_ptr += gl.multiple_of(start * b_stride, ALIGN)
    if WORK != ADDED:
        z_ptr += start * z_stride
        y_ptr += start * y_stride
        c_ptr += gl.multiple_of(start * c_stride, ALIGN)

    if GROUPS > 1:
        shared_delta = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK_D], SHARED)
        shared_gain = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK_D], SHARED)
    shared_b = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK_N], SHARED)
    if WORK == ADDED:
        total = gl.zeros([TILE, BLOCK_D], gl.float32, layout=SPREAD)
    else:
        shared_c = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK_N], SHARED)

    # past the end the last token is read again, so that no read depends on the length
    at = gl.minimum(t, length - 1)
    narrow_at = gl.minimum(narrow_t, length - 1)
    next_x = gl.load(x_ptr + (at * x_stride + d), mask=mask_d, other=0.0)
    next_dt = gl.load(dt_ptr + (at * dt_stride + d), mask=mask_d, other=0.0)
    next_b = gl.load(b_ptr + (gl.multiple_of(narrow_at * b_stride, [1, ALIGN]) + narrow_n), mask=mask_n, other=0.0)
    if WORK != ADDED:
        next_z = gl.load(z_ptr + (at * z_stride + d), mask=mask_d, other=0.0)
        next_c = gl.load(c_ptr + (gl.multiple_of(narrow_at * c_stride, [1, ALIGN]) + narrow_n), mask=mask_n, other=0.0)
    for first in range(0, length, TILE):
        x = next_x.to(gl.float32)
        dt = next_dt.to(gl.float32) + bias
        b = next_b.to(gl.float32)
        if WORK != ADDED:
            z = next_z.to(gl.float32)
            c = next_c.to(gl.float32)
        at = gl.minimum(t + (first + TILE), length - 1)
        narrow_at = gl.minimum(narrow_t + (first + TILE), length - 1)
        if LONG:
            at = at.to(gl.int64)
            narrow_at = narrow_at.to(gl.int64)
        next_x = gl.load(x_ptr + (at * x_stride + d), mask=mask_d, other=0.0)
        next_dt = gl.load(dt_ptr + (at * dt_stride + d), mask=mask_d, other=0.0)
        next_b = gl.load(b_ptr + (gl.multiple_of(narrow_at * b_stride, [1, ALIGN]) + narrow_n), mask=mask_n, other=0.0)
        if WORK != ADDED:
            narrow_offset = gl.multiple_of(narrow_at * c_stride, [1, ALIGN]) + narrow_n
            next_z = gl.load(z_ptr + (at * z_stride + d), mask=mask_d, other=0.0)
            next_c = gl.load(c_ptr + narrow_offset, mask=mask_n, other=0.0)

        # a delta of zero leaves the state as it is
        delta = gl.where(t < length - first, _softplus(dt), 0.0)
        gain = delta * x
        if GROUPS > 1:
            shared_delta.store(delta)
            shared_gain.store(gain)
        shared_b.store(b)
        if WORK == ADDED:
            total += delta
        else:
            shared_c.store(c)
            gate = _silu(z)
            y = gl.zeros([TILE, BLOCK_D], gl.float32, layout=SPREAD)

        for i in gl.static_range(TILE):
            if CHECKPOINT > 0 and i % CHECKPOINT == 0:
                position = segment * segment_size + first + i
                if position % CHECKPOINT == 0 and first + i < length:
                    index = begin // CHECKPOINT + row + position // CHECKPOINT
                    keep_ptr = checkpoint_ptr + index * ((dim + 31) // 32) * (N * 32)
                    gl.store(keep_ptr + (channel // 32) * (N * 32) + n * 32 + channel % 32, h, mask=mask)
            if GROUPS > 1:
                delta_i = shared_delta.slice(i, 1).load(ROW_D)
                gain_i = shared_gain.slice(i, 1).load(ROW_D)
            else:
                delta_i = gl.convert_layout(_pick(delta, t, i), gl.SliceLayout(0, ROW_D))[None, :]
                gain_i = gl.convert_layout(_pick(gain, t, i), gl.SliceLayout(0, ROW_D))[None, :]
            b_i = shared_b.slice(i, 1).load(ROW_N)
            h = gl.exp2(delta_i[:, None, :] * a) * h + gain_i[:, None, :] * b_i[:, :, None]
            if WORK != ADDED:
                c_i = shared_c.slice(i, 1).load(ROW_N)
                y_i = gl.sum(h * c_i[:, :, None], axis=1)
                y = gl.where(t == i, gl.convert_layout(y_i, SPREAD), y)
        if WORK != ADDED:
            y = (y + skip * x) * gate
            at = t + first
            live = (at < length) & mask_d
            if LONG:
                at = at.to(gl.int64)
            gl.store(y_ptr + (at * y_stride + d), y.to(y_ptr.dtype.element_ty), mask=live)

    if WORK == ADDED:
        gl.store(entry_ptr + (item + 1) * dim * N + n * dim + channel, h, mask=mask)
        flat_d = gl.program_id(1) * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, SPREAD))
        gl.store(total_ptr + item * dim + flat_d, gl.sum(total, axis=0), mask=flat_d < dim)
    elif WORK == WHOLE or is_last:
        gl.store(home, h.to(state_ptr.dtype.element_ty), mask=mask)
