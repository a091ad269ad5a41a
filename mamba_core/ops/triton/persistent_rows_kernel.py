"""One token each of 2 to 16 sequences through all layers in a single launch: a Gluon kernel, for NVIDIA GPUs.

As in ``persistent_step_kernel``, one program per multiprocessor owns a block of rows of every weight and stays for the
whole step, and warps of their own copy its weights through a ring of stages in shared memory. Here the products run on
the matrix units, weights as the operand that is 16 rows high, the sequences as its 8 or 16 columns. A stage is 16 rows
of 512 columns, or of 256; each multiplying warp has its own columns of all stages, so that what they are multiplied
with is read once, straight into registers, and its share of the sums stays its own until a phase ends.

Where a model is narrow, more programs than its weights have tiles would only wait for more of each other, so there are
fewer; and the sequences are shared out to groups of programs, each of which has all weights, and a counter, of its own.

x_proj is split by its columns: a program has those of its own channels, which it knows without asking. Its shares of
the sums go to memory, each program adds up a few of them over all programs, in a fixed order, and all read the result.
A layer has four waits, of which two are hidden behind the gate's half of in_proj:

    in_proj for x, convolution and SiLU, x_proj -> shares, counted
    first tiles of in_proj for the gate; awaited, shares added up -> low, counted
    other tiles of in_proj for the gate; awaited
    dt_proj, recurrence, gate -> y, counted and awaited
    out_proj, residual, squares for the norm -> gained, counted and awaited
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
    FIELDS,
    GAIN,
    IN_BIAS,
    OUT_BIAS,
    SKIP,
    TAPS,
    _await,
    _bf16,
    _count,
    _share,
    _sigmoid,
    _softplus,
    _view,
)
from mamba_core.ops.triton.persistent_rows_parts import (
    _begin,
    _home,
    _inputs_of_state,
    _past,
    _slots,
    _small,
    _state,
    _tell,
    _window_at,
)
from mamba_core.ops.triton.persistent_rows_phases import _multiply_out, _share_low, _sum_low
from mamba_core.ops.triton.persistent_rows_tiles import (
    HIGH,
    _copy_weights,
    _indices_2d,
    _indices_3d,
    _inputs,
    _multiply_block,
    _multiply_rows,
    _own_channels,
    _total,
)


@gluon.jit
def _advance(
    ring,
    sums,
    kept,
    table_ptr,
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    slots_ptr,
    conv_ptr,
    ssm_ptr,
    shares_ptr,
    low_ptr,
    y_ptr,
    gained_ptr,
    squares_ptr,
    counter_ptr,
    rows,
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
    WIDE: gl.constexpr = SIZES.WIDE
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    R: gl.constexpr = SIZES.R
    N: gl.constexpr = SIZES.N
    K: gl.constexpr = SIZES.K
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    BLOCK_N: gl.constexpr = SIZES.BLOCK_N
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    O_ROWS: gl.constexpr = SIZES.O_ROWS
    O_SPACE: gl.constexpr = SIZES.O_SPACE
    P_SPACE: gl.constexpr = SIZES.P_SPACE
    HAS_BIAS: gl.constexpr = SIZES.HAS_BIAS
    NORM: gl.constexpr = SIZES.NORM
    PROGRAMS: gl.constexpr = SIZES.PROGRAMS
    WARPS: gl.constexpr = SIZES.WARPS
    LOW_WIDTH: gl.constexpr = R + 2 * N
    LOW_ROWS: gl.constexpr = HIGH * WIDE // BLOCK_C
    DT_STAGES: gl.constexpr = (R + LOW_ROWS - 1) // LOW_ROWS
    C_SPACE: gl.constexpr = BLOCK_C // HIGH
    # whether the convolution's past is read a phase ahead: with more rows, a thread has no registers for that
    EARLY: gl.constexpr = BLOCK_B == 8
    x_kept, z_kept, dt_kept, low_kept = kept
    BLOCKS: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, BLOCKS, 8)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    # [tiles, warps, 16, B] of sums and what is left without the warps: channels, rows of the residual
    C_SUMS: gl.constexpr = gl.BlockedLayout(
        [1, WARPS, 1, 1], [1, 1, 32 // BLOCK_B, BLOCK_B], [C_SPACE, 1, WARPS // C_SPACE, 1], [3, 2, 1, 0]
    )
    CHANNEL: gl.constexpr = gl.SliceLayout(1, C_SUMS)
    O_SUMS: gl.constexpr = gl.BlockedLayout(
        [1, WARPS, 1, 1], [1, 1, 32 // BLOCK_B, BLOCK_B], [O_SPACE, 1, WARPS // O_SPACE, 1], [3, 2, 1, 0]
    )
    OUTPUT: gl.constexpr = gl.SliceLayout(1, O_SUMS)
    # [8, channels, N]
    STATE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [WARPS // SIZES.S_WARPS, SIZES.S_WARPS, 1], [2, 1, 0])
    STATE_C: gl.constexpr = gl.SliceLayout(2, STATE)
    STATE_N: gl.constexpr = gl.SliceLayout(1, STATE)
    # one value per program for each of B; [B, R]
    EACH: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_B, BLOCK_B // 4], [WARPS, 1], [1, 0])
    LOW: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])

    pid = gl.program_id(0)
    group = gl.program_id(1)
    tokens_ptr += group * BLOCK_B
    slots_ptr += group * BLOCK_B
    gained_ptr += group * (BLOCK_B * H)
    y_ptr += group * (BLOCK_B * D)
    low_ptr += group * (BLOCK_B * LOW_WIDTH)
    shares_ptr += group * (PROGRAMS * LOW_WIDTH * BLOCK_B)
    squares_ptr += group * BLOCK_B
    counter_ptr += group * 32
    rows = gl.minimum(rows - group * BLOCK_B, BLOCK_B)
    first_c, count_c = _own_channels(SIZES)
    own_c = first_c, count_c
    first_o, count_o = _share(H, PROGRAMS)
    first_l, count_l = _share(LOW_WIDTH * BLOCK_B // 4, PROGRAMS)

    # where each row's state lives
    conv_slot = _slots(slots_ptr, _indices_3d(C_SPACE, HIGH, BLOCK_B, CHANNEL)[2], rows)
    ssm_slots = ()
    for part in gl.static_range(BLOCK_B // 8):
        ssm_slots += (_slots(slots_ptr, part * 8 + _indices_3d(8, BLOCK_C, BLOCK_N, STATE)[0], rows),)
    residual, gain = _begin(tokens_ptr, embeddings_ptr, gain_ptr, first_o, count_o, rows, OUTPUT, SIZES)
    _tell(residual, gain, gained_ptr, squares_ptr, first_o, count_o, rows, OUTPUT, SIZES)

    if EARLY:
        taps_at, conv_bias_at = gl.load(table_ptr + TAPS), gl.load(table_ptr + CONV_BIAS)
        small = _small((taps_at, conv_bias_at), (conv_ptr, conv_stride), conv_slot, own_c, rows, CHANNEL, SIZES)

    at = (pid * 0, pid * 0)
    target = 0
    for layer in range(layers):
        entry = table_ptr + layer * FIELDS
        if EARLY:
            following = table_ptr + gl.minimum(layer + 1, layers - 1) * FIELDS
            taps_at, conv_bias_at = gl.load(following + TAPS), gl.load(following + CONV_BIAS)
        else:
            taps_at, conv_bias_at = gl.load(entry + TAPS), gl.load(entry + CONV_BIAS)
        in_bias_at, out_bias_at = gl.load(entry + IN_BIAS), gl.load(entry + OUT_BIAS)
        if EARLY:
            dt_bias_at, decay_at = gl.load(entry + DT_BIAS), gl.load(entry + DECAY)
            skip_at, gain_at = gl.load(entry + SKIP), gl.load(entry + GAIN)
        target += PROGRAMS
        _count(counter_ptr)
        # what is small and this program's own, on its way while it waits
        if not EARLY:
            weights_at, conv = (taps_at, conv_bias_at), (conv_ptr, conv_stride)
            past, newest, columns = _past(weights_at, conv, conv_slot, own_c, rows, CHANNEL, SIZES)
        if HAS_BIAS:
            tile, row, b = _indices_3d(C_SPACE, HIGH, BLOCK_B, CHANNEL)
            c = tile * HIGH + row
            mask_c = c < count_c
            in_bias_ptr = _bf16(in_bias_at) + first_c
            x_bias = gl.load(in_bias_ptr + c, mask=mask_c, other=0.0).to(gl.float32)
            z_bias = gl.load(in_bias_ptr + D + c, mask=mask_c, other=0.0).to(gl.float32)
            tile, row, b = _indices_3d(O_SPACE, HIGH, BLOCK_B, OUTPUT)
            o = tile * O_ROWS + row
            out_bias_ptr = _bf16(out_bias_at) + first_o
            out_bias = gl.load(out_bias_ptr + o, mask=(row < O_ROWS) & (o < count_o), other=0.0)
            residual += gl.where(b < rows, out_bias.to(gl.float32), 0.0)
        _await(counter_ptr, target)

        hidden = ()
        for j in gl.static_range(H // WIDE):
            hidden += (_inputs(gained_ptr, j * WIDE, rows, WIDE, H, BLOCK_B, WARPS),)
        p, b = _indices_2d(P_SPACE, BLOCK_B, EACH)
        squares_at = squares_ptr + (p * (SIZES.GROUPS * BLOCK_B) + b)
        squares = gl.load(squares_at, mask=(p < PROGRAMS) & (b >= 0), other=0.0, cache_modifier=".cg")
        at = _multiply_rows(ring, at, hidden, sums, 0, SIZES.C_TILES, SIZES)
        scale = 1.0 / gl.sqrt(gl.sum(squares, axis=0) / H + eps)
        scale = gl.convert_layout(scale, gl.SliceLayout(0, gl.SliceLayout(1, CHANNEL)))[None, None, :]
        x = _total(sums, C_SPACE, C_SUMS, SIZES) * scale
        if HAS_BIAS:
            x += x_bias
        new = x.to(conv_ptr.dtype.element_ty)
        if EARLY:
            columns = small
            x = new.to(gl.float32) * small[2 * K - 2].to(gl.float32)
            for j in gl.static_range(K - 1):
                x += small[j].to(gl.float32) * small[K - 1 + j].to(gl.float32)
            if SIZES.HAS_CONV_BIAS:
                x += small[2 * K - 1].to(gl.float32)
        else:
            x = past + new.to(gl.float32) * newest
        # other programs' channels, and sums of tiles that are not there, may be anything but must count as zero
        tile, row, b = _indices_3d(C_SPACE, HIGH, BLOCK_B, CHANNEL)
        mask = (tile * HIGH + row < count_c) & (b < rows)
        x = gl.where(mask, x * _sigmoid(x), 0.0).to(gl.bfloat16)
        _view(x_kept, gl.bfloat16, [BLOCK_B, C_SPACE, HIGH], FLAT).permute((1, 2, 0)).store(x)
        inner = x_kept.permute((1, 0)).load(OPERAND)
        if not EARLY:
            dt_bias_at, decay_at = gl.load(entry + DT_BIAS), gl.load(entry + DECAY)
            skip_at, gain_at = gl.load(entry + SKIP), gl.load(entry + GAIN)
        at = _share_low(ring, at, inner, shares_ptr, pid, SIZES)
        target += PROGRAMS
        _count(counter_ptr)

        # by now every thread has read what was there, also one that holds an element beside others
        tile, row, b = _indices_3d(C_SPACE, HIGH, BLOCK_B, CHANNEL)
        c = tile * HIGH + row
        mask = (c < count_c) & (b < rows)
        window_ptr, TAP_STRIDE = _window_at((conv_ptr, conv_stride), conv_slot, first_c + c, SIZES)
        for j in gl.static_range(1, K - 1):
            gl.store(window_ptr + (j - 1) * TAP_STRIDE, columns[j], mask=mask)
        gl.store(window_ptr + (K - 2) * TAP_STRIDE, new, mask=mask)

        # what the recurrence needs and no other program writes
        _, d, n = _indices_3d(8, BLOCK_C, BLOCK_N, STATE)
        decay_ptr = decay_at.to(gl.pointer_type(gl.float32)) + first_c * N
        a_ptr = gl.multiple_of(decay_ptr + (d * N + n), [1, 1, 16])
        a = gl.load(a_ptr, mask=(d < count_c) & (n < N), other=0.0) * LOG2_E
        states = (_state((ssm_ptr, ssm_stride), ssm_slots[0], first_c, count_c, STATE, SIZES),)
        _, d = _indices_2d(8, BLOCK_C, STATE_C)
        dt_bias_ptr = _bf16(dt_bias_at) + first_c
        dt_bias = gl.load(dt_bias_ptr + d, mask=d < count_c, other=0.0).to(gl.float32)
        skip_ptr = skip_at.to(gl.pointer_type(SIZES.SKIP_DTYPE)) + first_c
        skip = gl.load(skip_ptr + d, mask=d < count_c, other=0.0).to(gl.float32)
        tile, row, b = _indices_3d(O_SPACE, HIGH, BLOCK_B, OUTPUT)
        o = tile * O_ROWS + row
        next_gain_ptr = _bf16(gain_at) + first_o
        gain = gl.load(next_gain_ptr + o, mask=(row < O_ROWS) & (o < count_o), other=0.0).to(gl.float32)
        at = _multiply_rows(ring, at, hidden, sums, 0, SIZES.Z_TILES, SIZES)

        _await(counter_ptr, target)
        _sum_low(shares_ptr, low_ptr, first_l, count_l, SIZES)
        target += PROGRAMS
        _count(counter_ptr)

        at = _multiply_rows(ring, at, hidden, sums, SIZES.Z_TILES, SIZES.C_TILES, SIZES)
        z = _total(sums, C_SPACE, C_SUMS, SIZES) * scale
        if HAS_BIAS:
            z += z_bias
        z = z.to(gl.bfloat16).to(gl.float32)
        _view(z_kept, gl.float32, [BLOCK_B, C_SPACE, HIGH], FLAT).permute((1, 2, 0)).store(z * _sigmoid(z))

        _await(counter_ptr, target)
        power = gl.zeros([BLOCK_B], gl.float32, gl.SliceLayout(1, LOW))
        b, r = _indices_2d(BLOCK_B, LOW_ROWS, LOW)
        for i in gl.static_range(DT_STAGES):
            mask = gl.max_constancy((i * LOW_ROWS + r < R) & (b >= 0), [1, 4])
            low = gl.load(low_ptr + (b * LOW_WIDTH + i * LOW_ROWS + r), mask=mask, other=0.0, cache_modifier=".cg")
            power += gl.sum(low * low, axis=1)
            low_kept.index(i).store(low.to(gl.bfloat16))
        inputs = (_inputs_of_state(low_ptr, 0, STATE_N, SIZES),)
        dt = gl.zeros([BLOCK_C, BLOCK_B], gl.float32, BLOCKS)
        for i in gl.static_range(DT_STAGES):
            low = low_kept.index(i).permute((1, 0)).load(OPERAND)
            at, dt = _multiply_block(ring, at, low, dt, BLOCK_C, SIZES)
        if NORM:
            power = gl.convert_layout(power, gl.SliceLayout(0, BLOCKS))
            dt = dt / gl.sqrt(power / R + inner_eps)[None, :]
        dt_kept.store(dt)
        moved = ()
        for part in gl.static_range(BLOCK_B // 8):
            b_, c_ = inputs[part]
            if part + 1 < BLOCK_B // 8:
                inputs += (_inputs_of_state(low_ptr, part + 1, STATE_N, SIZES),)
                slot = ssm_slots[part + 1]
                states += (_state((ssm_ptr, ssm_stride), slot, first_c, count_c, STATE, SIZES),)
            if NORM:
                b_ = b_ / gl.sqrt(gl.sum(b_ * b_, axis=1) / N + inner_eps)[:, None]
                c_ = c_ / gl.sqrt(gl.sum(c_ * c_, axis=1) / N + inner_eps)[:, None]
            delta = _softplus(dt_kept.permute((1, 0)).slice(part * 8, 8).load(STATE_C) + dt_bias)
            x = x_kept.slice(part * 8, 8).load(STATE_C).to(gl.float32)
            grown = gl.expand_dims(delta * x, 2) * gl.expand_dims(b_, 1)
            h = gl.exp2(gl.expand_dims(delta, 2) * a) * states[part].to(gl.float32) + grown
            y = gl.sum(h * gl.expand_dims(c_, 1), axis=2) + skip * x
            y = y * z_kept.slice(part * 8, 8).load(STATE_C)
            b, d = _indices_2d(8, BLOCK_C, STATE_C)
            y_at = y_ptr + ((part * 8 + b) * D + first_c + d)
            gl.store(y_at, y.to(gl.bfloat16), mask=(part * 8 + b < rows) & (d < count_c))
            moved += (h,)
        target += PROGRAMS
        _count(counter_ptr)
        for part in gl.static_range(BLOCK_B // 8):
            b, d, n = _indices_3d(8, BLOCK_C, BLOCK_N, STATE)
            h_ptr = ssm_ptr + _home(ssm_slots[part], ssm_stride) + ((first_c + d) * N + n)
            mask = (d < count_c) & (n < N) & (part * 8 + b < rows)
            gl.store(h_ptr, moved[part].to(ssm_ptr.dtype.element_ty), mask=mask)
        if EARLY:
            # of the layer that follows; behind the last, of none that is
            next_ptr = conv_ptr + gl.where(layer + 1 < layers, conv_layer_stride, 0)
            small = _small((taps_at, conv_bias_at), (next_ptr, conv_stride), conv_slot, own_c, rows, CHANNEL, SIZES)
        _await(counter_ptr, target)

        at = _multiply_out(ring, at, y_ptr, rows, sums, SIZES)
        tile, row, b = _indices_3d(O_SPACE, HIGH, BLOCK_B, OUTPUT)
        mask = (row < O_ROWS) & (tile * O_ROWS + row < count_o) & (b < rows)
        residual += gl.where(mask, _total(sums, O_SPACE, O_SUMS, SIZES), 0.0)
        _tell(residual, gain, gained_ptr, squares_ptr, first_o, count_o, rows, OUTPUT, SIZES)
        conv_ptr += conv_layer_stride
        ssm_ptr += ssm_layer_stride

    # nobody waits any more: the last one leaves the counter as it was
    if gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == target + PROGRAMS - 1:
        gl.store(counter_ptr, 0)


@gluon.jit(do_not_specialize=["rows", "layers", "eps", "inner_eps"])
def persistent_rows_kernel(
    table_ptr,
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    slots_ptr,
    conv_ptr,
    ssm_ptr,
    shares_ptr,
    low_ptr,
    y_ptr,
    gained_ptr,
    squares_ptr,
    counter_ptr,
    rows,
    layers,
    conv_layer_stride,
    conv_stride,
    ssm_layer_stride,
    ssm_stride,
    eps,
    inner_eps,
    SIZES: gl.constexpr,
):
    """gained [B, H] and squares [PROGRAMS, GROUPS BLOCK_B] of the last residual for tokens [B], states moved on.

    table [layers, FIELDS] int64 addresses. slots [B]. shares [GROUPS, PROGRAMS, R + 2 N, BLOCK_B], low [GROUPS BLOCK_B,
    R + 2 N] fp32, y [B, D]: room for what programs tell each other. counter [32 GROUPS] int32 is zero before and after.
    """
    WIDE: gl.constexpr = SIZES.WIDE
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    O_SPACE: gl.constexpr = SIZES.O_SPACE
    STAGES: gl.constexpr = SIZES.STAGES
    WARPS: gl.constexpr = SIZES.WARPS
    COPIERS: gl.constexpr = SIZES.COPIERS
    LOW_ROWS: gl.constexpr = HIGH * WIDE // BLOCK_C
    DT_STAGES: gl.constexpr = (SIZES.R + LOW_ROWS - 1) // LOW_ROWS
    SPACE: gl.constexpr = O_SPACE if O_SPACE > BLOCK_C // HIGH else BLOCK_C // HIGH
    # a quarter of a warp reads 64 bytes of two rows: into different banks
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(32, 1, WIDE // WARPS // 32, [2, 1, 0])
    SWIZZLED_2D: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    FLAT_2D: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, WARPS, HIGH, WIDE // WARPS], SWIZZLED)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=COPIERS * 32)
        mbarrier.init(freed.index(i), count=1)
    ring = (tiles, filled, freed)
    sums = gl.allocate_shared_memory(gl.float32, [SPACE, WARPS, HIGH, BLOCK_B], FLAT)
    kept = (
        gl.allocate_shared_memory(gl.bfloat16, [BLOCK_B, BLOCK_C], FLAT_2D),
        gl.allocate_shared_memory(gl.float32, [BLOCK_B, BLOCK_C], FLAT_2D),
        gl.allocate_shared_memory(gl.float32, [BLOCK_C, BLOCK_B], FLAT_2D),
        gl.allocate_shared_memory(gl.bfloat16, [DT_STAGES, BLOCK_B, LOW_ROWS], SWIZZLED_2D),
    )
    gl.warp_specialize(
        [
            (
                _advance,
                (
                    ring,
                    sums,
                    kept,
                    table_ptr,
                    tokens_ptr,
                    embeddings_ptr,
                    gain_ptr,
                    slots_ptr,
                    conv_ptr,
                    ssm_ptr,
                    shares_ptr,
                    low_ptr,
                    y_ptr,
                    gained_ptr,
                    squares_ptr,
                    counter_ptr,
                    rows,
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
        [COPIERS],
        [COPIER_REGISTERS],
    )
