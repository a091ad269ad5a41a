"""One token of one sequence through all layers in a single launch: a Gluon kernel, for NVIDIA GPUs.

A step streams every weight past the chip once, and a launch per product lets memory rest at each launch. Here one
program per multiprocessor stays for the whole step. It owns a block of rows of every weight, and a few of its warps
copy them, in the order of their use, into a ring of stages in shared memory, ahead of those that multiply: so copies go
on while the programs wait for each other. They are paced, because what the programs wait for queues behind them: only
about as much is on its way as keeps memory busy.

A stage is a few whole rows, as tiles side by side; in a tile a multiplying warp has 256 columns of GROUPS rows, and it
keeps its share of a row's sum to itself until all rows of a phase are there. Weights in int8 are widened in registers.

A layer has four phases, after each of which every program needs what all have written, so a counter in memory tells
when all have. Two of the four waits are hidden behind the second half of in_proj, which nothing waits for:

    first half of in_proj, convolution and SiLU -> x, counted
    second half, first part
    x_proj of x -> low, counted
    second half, second part
    dt_proj, recurrence, gate -> y, counted and awaited
    out_proj, residual, squares for the norm -> gained, counted and awaited

Whatever other programs have written is read past the first-level cache. The residual stays in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mamba_core.ops.triton.math import LOG2_E
from mamba_core.ops.triton.persistent import (
    CONV_BIAS,
    COPIER_REGISTERS,
    DECAY,
    DT_BIAS,
    DT_PROJ,
    FIELDS,
    GAIN,
    IN_BIAS,
    IN_SCALES,
    OUT_BIAS,
    OUT_SCALES,
    SKIP,
    TAPS,
    X_SCALES,
    _await,
    _barrier,
    _bf16,
    _count,
    _share,
    _sigmoid,
    _softplus,
)
from mamba_core.ops.triton.persistent_step_tiles import _copy_weights, _inputs, _multiply, _total


@gluon.jit
def _scales(entry, rows, mask, IS_INT8: gl.constexpr):
    """What sums of these rows of a product are to be multiplied with; ``entry`` holds the address of the scales."""
    if IS_INT8:
        return gl.load(gl.load(entry).to(gl.pointer_type(gl.float32)) + rows, mask=mask, other=0.0)
    else:  # noqa: RET505  as above
        return 1.0


@gluon.jit
def _advance(
    ring,
    sums,
    x_kept,
    table_ptr,
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    slots_ptr,
    conv_ptr,
    ssm_ptr,
    x_ptr,
    low_ptr,
    y_ptr,
    gained_ptr,
    squares_ptr,
    counter_ptr,
    layers,
    conv_layer_stride,
    conv_stride,
    ssm_layer_stride,
    ssm_stride,
    eps,
    inner_eps,
    SIZES: gl.constexpr,
):
    """What the warps that multiply do: the step itself."""
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    R: gl.constexpr = SIZES.R
    N: gl.constexpr = SIZES.N
    K: gl.constexpr = SIZES.K
    R_HIGH: gl.constexpr = SIZES.R_HIGH
    R_LOW: gl.constexpr = SIZES.R_LOW
    BLOCK_N: gl.constexpr = SIZES.BLOCK_N
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    BLOCK_O: gl.constexpr = SIZES.BLOCK_O
    BLOCK_P: gl.constexpr = SIZES.BLOCK_P
    X_STAGES: gl.constexpr = SIZES.X_STAGES
    Z_STAGES: gl.constexpr = SIZES.Z_STAGES
    HAS_BIAS: gl.constexpr = SIZES.HAS_BIAS
    PROGRAMS: gl.constexpr = SIZES.PROGRAMS
    WARPS: gl.constexpr = SIZES.WARPS
    LOW_WIDTH: gl.constexpr = R + 2 * N
    SHARES: gl.constexpr = 2
    WIDE_SHARES: gl.constexpr = 4
    x_sums, z_sums, p_sums, o_sums = sums
    IS_INT8: gl.constexpr = ring[0][0].dtype == gl.int8
    # channels and their sums; rows of the residual, of low; [channels, N]; [channels, R]; one value per program
    CHANNELS: gl.constexpr = gl.BlockedLayout([1, SHARES], [32, 1], [WARPS, 1], [1, 0])
    CHANNEL: gl.constexpr = gl.SliceLayout(1, CHANNELS)
    OUTPUTS: gl.constexpr = gl.BlockedLayout([1, WIDE_SHARES], [32, 1], [WARPS, 1], [1, 0])
    OUTPUT: gl.constexpr = gl.SliceLayout(1, OUTPUTS)
    STATE: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    STATE_D: gl.constexpr = gl.SliceLayout(1, STATE)
    HIGH: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    LOW: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    EACH: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])

    pid = gl.program_id(0)
    first_c, count_c = _share(D, PROGRAMS)
    first_p, count_p = _share(LOW_WIDTH, PROGRAMS)
    first_o, count_o = _share(H, PROGRAMS)
    c = gl.arange(0, BLOCK_C, layout=CHANNEL)
    mask_c = c < count_c
    o = gl.arange(0, BLOCK_O, layout=OUTPUT)
    mask_o = o < count_o
    p = gl.arange(0, BLOCK_P, layout=OUTPUT)
    d = gl.arange(0, BLOCK_C, layout=STATE_D)
    mask_d = d < count_c
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, STATE))
    mask_n = n < N
    tile = (first_c + d)[:, None] * N + n[None, :]
    mask = mask_d[:, None] & mask_n[None, :]
    high_d = gl.arange(0, BLOCK_C, layout=gl.SliceLayout(1, HIGH))[:, None]
    high_r = gl.arange(0, R_HIGH, layout=gl.SliceLayout(0, HIGH))
    low_d = gl.arange(0, BLOCK_C, layout=gl.SliceLayout(1, LOW))[:, None]
    if R_LOW > 0:
        low_r = R_HIGH + gl.arange(0, R_LOW, layout=gl.SliceLayout(0, LOW))
    each = gl.arange(0, 256, layout=EACH)

    token = gl.load(tokens_ptr)
    home = gl.load(slots_ptr)
    CHANNEL_STRIDE: gl.constexpr = 1 if SIZES.TAP_MAJOR else K - 1
    TAP_STRIDE: gl.constexpr = D if SIZES.TAP_MAJOR else 1
    conv_ptr += home * conv_stride + first_c * CHANNEL_STRIDE
    ssm_ptr += home * ssm_stride
    residual = gl.load(embeddings_ptr + token * H + first_o + o, mask=mask_o, other=0.0).to(gl.float32)
    gain = gl.load(gain_ptr + first_o + o, mask=mask_o, other=0.0).to(gl.float32)
    gl.store(gained_ptr + first_o + o, (residual * gain).to(gl.bfloat16), mask=mask_o)
    gl.store(squares_ptr + pid, gl.sum(residual * residual, axis=0))

    at = (pid * 0, pid * 0)
    target = 0
    for layer in range(layers):
        target += PROGRAMS
        _count(counter_ptr)
        # what is small and this program's own, on its way while it waits
        entry = table_ptr + layer * FIELDS
        taps_ptr = _bf16(gl.load(entry + TAPS)) + (first_c + c) * K
        conv_bias_ptr = _bf16(gl.load(entry + CONV_BIAS)) + first_c + c
        dt_ptr = _bf16(gl.load(entry + DT_PROJ)) + first_c * R
        dt_bias_ptr = _bf16(gl.load(entry + DT_BIAS)) + first_c + d
        decay_ptr = gl.load(entry + DECAY).to(gl.pointer_type(gl.float32)) + tile
        skip_ptr = gl.load(entry + SKIP).to(gl.pointer_type(SIZES.SKIP_DTYPE)) + first_c + d
        next_gain_ptr = _bf16(gl.load(entry + GAIN)) + first_o + o
        x_scales = _scales(entry + IN_SCALES, first_c + c, mask_c, IS_INT8)
        z_scales = _scales(entry + IN_SCALES, D + first_c + c, mask_c, IS_INT8)
        p_scales = _scales(entry + X_SCALES, first_p + p, p < count_p, IS_INT8)
        o_scales = _scales(entry + OUT_SCALES, first_o + o, mask_o, IS_INT8)
        window_ptr = conv_ptr + c * CHANNEL_STRIDE
        past = gl.zeros([BLOCK_C], gl.float32, CHANNEL)
        if SIZES.HAS_CONV_BIAS:
            past += gl.load(conv_bias_ptr, mask=mask_c, other=0.0).to(gl.float32)
        columns = ()
        for j in gl.static_range(K - 1):
            old = gl.load(window_ptr + j * TAP_STRIDE, mask=mask_c, other=0.0)
            past += old.to(gl.float32) * gl.load(taps_ptr + j, mask=mask_c, other=0.0).to(gl.float32)
            columns += (old,)
        newest = gl.load(taps_ptr + K - 1, mask=mask_c, other=0.0).to(gl.float32)
        if HAS_BIAS:
            in_bias_ptr = _bf16(gl.load(entry + IN_BIAS)) + first_c + c
            x_bias = gl.load(in_bias_ptr, mask=mask_c, other=0.0).to(gl.float32)
            z_bias = gl.load(in_bias_ptr + D, mask=mask_c, other=0.0).to(gl.float32)
            out_bias_ptr = _bf16(gl.load(entry + OUT_BIAS)) + first_o + o
            residual += gl.load(out_bias_ptr, mask=mask_o, other=0.0).to(gl.float32)
        _await(counter_ptr, target)

        hidden = _inputs(gained_ptr, SHARES, SIZES)
        squares = gl.load(squares_ptr + each, mask=each < PROGRAMS, other=0.0, cache_modifier=".cg")
        at = _multiply(ring, at, hidden, x_sums, 0, X_STAGES, SHARES, SIZES)
        scale = 1.0 / gl.sqrt(gl.sum(squares, axis=0) / H + eps)
        x = _total(x_sums, BLOCK_C, SHARES, CHANNELS) * (x_scales * scale)
        if HAS_BIAS:
            x += x_bias
        kept = x.to(conv_ptr.dtype.element_ty)
        # every thread has read what was there, also one that holds an element beside others
        _barrier()
        for j in gl.static_range(1, K - 1):
            gl.store(window_ptr + (j - 1) * TAP_STRIDE, columns[j], mask=mask_c)
        gl.store(window_ptr + (K - 2) * TAP_STRIDE, kept, mask=mask_c)
        x = past + kept.to(gl.float32) * newest
        x = (x * _sigmoid(x)).to(gl.bfloat16)
        gl.store(x_ptr + first_c + c, x, mask=mask_c)
        x_kept.store(x.to(gl.float32))
        target += PROGRAMS
        _count(counter_ptr)

        # what the recurrence needs and no other program writes
        high_ptr = gl.multiple_of(dt_ptr + high_d * R + high_r[None, :], [1, 16])
        w_high = gl.load(high_ptr, mask=high_d < count_c, other=0.0)
        if R_LOW > 0:
            low_mask = (low_d < count_c) & (low_r < R)[None, :]
            w_low = gl.load(gl.multiple_of(dt_ptr + low_d * R + low_r[None, :], [1, 16]), mask=low_mask, other=0.0)
        dt_bias = gl.load(dt_bias_ptr, mask=mask_d, other=0.0).to(gl.float32)
        a = gl.load(decay_ptr, mask=mask, other=0.0) * LOG2_E
        skip = gl.load(skip_ptr, mask=mask_d, other=0.0).to(gl.float32)
        h = gl.load(ssm_ptr + tile, mask=mask, other=0.0).to(gl.float32)
        gain = gl.load(next_gain_ptr, mask=mask_o, other=0.0).to(gl.float32)

        at = _multiply(ring, at, hidden, z_sums, 0, Z_STAGES, SHARES, SIZES)

        _await(counter_ptr, target)
        inner = _inputs(x_ptr, WIDE_SHARES, SIZES)
        at = _multiply(ring, at, inner, p_sums, 0, SIZES.P_STAGES, WIDE_SHARES, SIZES)
        low = _total(p_sums, BLOCK_P, WIDE_SHARES, OUTPUTS) * p_scales
        gl.store(low_ptr + first_p + p, low, mask=p < count_p)
        target += PROGRAMS
        _count(counter_ptr)

        at = _multiply(ring, at, hidden, z_sums, Z_STAGES, X_STAGES, SHARES, SIZES)
        z = _total(z_sums, BLOCK_C, SHARES, CHANNELS) * (z_scales * scale)
        if HAS_BIAS:
            z += z_bias
        z = gl.convert_layout(z.to(gl.bfloat16).to(gl.float32), STATE_D)

        _await(counter_ptr, target)
        low = gl.load(low_ptr + high_r, cache_modifier=".cg")
        b = gl.load(low_ptr + R + n, mask=mask_n, other=0.0, cache_modifier=".cg")
        c_ = gl.load(low_ptr + R + N + n, mask=mask_n, other=0.0, cache_modifier=".cg")
        power = gl.sum(low * low, axis=0)
        dt = gl.convert_layout(gl.sum(w_high.to(gl.float32) * low[None, :], axis=1), STATE_D)
        if R_LOW > 0:
            low = gl.load(low_ptr + low_r, mask=low_r < R, other=0.0, cache_modifier=".cg")
            power += gl.sum(low * low, axis=0)
            dt += gl.convert_layout(gl.sum(w_low.to(gl.float32) * low[None, :], axis=1), STATE_D)
        if SIZES.NORM:
            dt = dt / gl.sqrt(power / R + inner_eps)
            b = b / gl.sqrt(gl.sum(b * b, axis=0) / N + inner_eps)
            c_ = c_ / gl.sqrt(gl.sum(c_ * c_, axis=0) / N + inner_eps)
        delta = _softplus(dt + dt_bias)
        x = x_kept.load(STATE_D)
        h = gl.exp2(delta[:, None] * a) * h + (delta * x)[:, None] * b[None, :]
        y = gl.sum(h * c_[None, :], axis=1) + skip * x
        y = y * (z * _sigmoid(z))
        gl.store(y_ptr + first_c + d, y.to(gl.bfloat16), mask=mask_d)
        target += PROGRAMS
        _count(counter_ptr)
        gl.store(ssm_ptr + tile, h.to(ssm_ptr.dtype.element_ty), mask=mask)
        _await(counter_ptr, target)

        inner = _inputs(y_ptr, WIDE_SHARES, SIZES)
        at = _multiply(ring, at, inner, o_sums, 0, SIZES.O_STAGES, WIDE_SHARES, SIZES)
        residual += gl.where(mask_o, _total(o_sums, BLOCK_O, WIDE_SHARES, OUTPUTS) * o_scales, 0.0)
        gl.store(gained_ptr + first_o + o, (residual * gain).to(gl.bfloat16), mask=mask_o)
        gl.store(squares_ptr + pid, gl.sum(residual * residual, axis=0))
        conv_ptr += conv_layer_stride
        ssm_ptr += ssm_layer_stride

    # nobody waits any more: the last one leaves the counter as it was
    if gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == target + PROGRAMS - 1:
        gl.store(counter_ptr, 0)


@gluon.jit(do_not_specialize=["layers", "eps", "inner_eps"])
def persistent_step_kernel(
    table_ptr,
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    slots_ptr,
    conv_ptr,
    ssm_ptr,
    x_ptr,
    low_ptr,
    y_ptr,
    gained_ptr,
    squares_ptr,
    counter_ptr,
    layers,
    conv_layer_stride,
    conv_stride,
    ssm_layer_stride,
    ssm_stride,
    eps,
    inner_eps,
    SIZES: gl.constexpr,
):
    """gained [H] and squares [PROGRAMS] of the last residual for token [1], states in slot [1] moved on.

    table [layers, FIELDS] int64 addresses. x, y [D], low [R + 2 N] fp32: room for what programs tell each other.
    counter is zero before and after.
    """
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    BLOCK_O: gl.constexpr = SIZES.BLOCK_O
    BLOCK_P: gl.constexpr = SIZES.BLOCK_P
    PARTS: gl.constexpr = SIZES.PARTS
    STAGES: gl.constexpr = SIZES.STAGES
    # rows of a stage, of in_proj and of the products that are twice as wide
    ROWS: gl.constexpr = PARTS // 2
    WIDE_ROWS: gl.constexpr = PARTS // 4
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SHARED_1D: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = ()
    for _ in gl.static_range(SIZES.H // 512):
        tiles += (gl.allocate_shared_memory(SIZES.WEIGHT_DTYPE, [STAGES, PARTS, 256], SHARED),)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=SIZES.COPIERS * 32)
        mbarrier.init(freed.index(i), count=1)
    ring = (tiles, filled, freed)
    sums = (
        gl.allocate_shared_memory(gl.float32, [BLOCK_C // ROWS, ROWS, 2], SHARED),
        gl.allocate_shared_memory(gl.float32, [BLOCK_C // ROWS, ROWS, 2], SHARED),
        gl.allocate_shared_memory(gl.float32, [BLOCK_P // WIDE_ROWS, WIDE_ROWS, 4], SHARED),
        gl.allocate_shared_memory(gl.float32, [BLOCK_O // WIDE_ROWS, WIDE_ROWS, 4], SHARED),
    )
    x_kept = gl.allocate_shared_memory(gl.float32, [BLOCK_C], SHARED_1D)
    gl.warp_specialize(
        [
            (
                _advance,
                (
                    ring,
                    sums,
                    x_kept,
                    table_ptr,
                    tokens_ptr,
                    embeddings_ptr,
                    gain_ptr,
                    slots_ptr,
                    conv_ptr,
                    ssm_ptr,
                    x_ptr,
                    low_ptr,
                    y_ptr,
                    gained_ptr,
                    squares_ptr,
                    counter_ptr,
                    layers,
                    conv_layer_stride,
                    conv_stride,
                    ssm_layer_stride,
                    ssm_stride,
                    eps,
                    inner_eps,
                    SIZES,
                ),
            ),
            (_copy_weights, (ring, table_ptr, layers, SIZES)),
        ],
        [SIZES.COPIERS],
        [COPIER_REGISTERS],
    )
