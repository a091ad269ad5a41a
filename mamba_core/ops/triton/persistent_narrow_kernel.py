"""One token each of up to 64 sequences through all layers of a narrow model in a single launch: a Gluon kernel.

As ``persistent_wide_kernel``, for models so narrow that a program's part of out_proj fits in its shared memory, all
columns of it. There the four programs of a group share out their rows instead of the columns, and have no sums to
exchange. x_proj is shared out by 16 outputs and 8 rows, which some of the programs have, instead of by columns, so that
what they tell each other is x itself and not as many shares as there are programs. So a layer has four waits:

    in_proj, convolution and SiLU -> x, counted and awaited
    x_proj -> low, counted and awaited
    dt_proj, recurrence, gate -> y, counted and awaited
    out_proj, residual, squares for the norm -> gained, counted and awaited

in_proj and dt_proj run as there. x_proj and out_proj have few outputs for each program and many columns, so that each
warp has columns of its own, and what they have is added up.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mamba_core.ops.triton.persistent import (
    CONV_BIAS,
    DECAY,
    DT_BIAS,
    FIELDS,
    GAIN,
    SKIP,
    TAPS,
    X_PROJ,
    _await,
    _barrier,
    _bf16,
    _count,
)
from mamba_core.ops.triton.persistent_narrow_tiles import (
    LOW_HIGH,
    LOW_ROWS,
    WARPS,
    WIDE,
    _copy_inputs,
    _copy_weights,
    _low_product,
    _low_weights,
    _make_products,
    _out_product,
)
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d, _nothing
from mamba_core.ops.triton.persistent_wide_parts import (
    PART,
    _bias,
    _constants_of_state,
    _convolve,
    _delta,
    _embedded,
    _gain,
    _home_of_windows,
    _keep,
    _keep_newest,
    _move_on,
    _moved,
    _pairs,
    _recall,
    _scale,
    _slots,
    _slots_of_windows,
    _state,
    _tell,
    _windows,
)
from mamba_core.ops.triton.persistent_wide_tiles import DEEP, QUARTERS, ROWS, TILES

# of a thread that makes products, and of one that copies; the others share what is left
PRODUCT_REGISTERS = gl.constexpr(80)
COPIER_REGISTERS = gl.constexpr(48)


@gluon.jit
def _advance(
    ring,
    outs,
    x_tiles,
    go,
    done,
    sums,
    kept,
    table_ptr,
    begin,
    slots_ptr,
    states,
    told,
    counter_ptr,
    rows,
    layers,
    strides,
    eps,
    SIZES: gl.constexpr,
):
    """What the first warps do: the step itself, but for in_proj."""
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    R: gl.constexpr = SIZES.R
    N: gl.constexpr = SIZES.N
    A: gl.constexpr = SIZES.A
    SPACE: gl.constexpr = SIZES.SPACE
    DEPTH: gl.constexpr = SIZES.DEPTH
    LOW_WIDTH: gl.constexpr = R + 2 * N
    C: gl.constexpr = A // 2
    GROUPS: gl.constexpr = H // A
    PROGRAMS: gl.constexpr = QUARTERS * GROUPS
    OWN: gl.constexpr = SPACE // QUARTERS
    PARTS: gl.constexpr = SPACE // PART
    LOW_GROUPS: gl.constexpr = LOW_WIDTH // LOW_HIGH
    # of x_proj's sums
    LOW: gl.constexpr = gl.SliceLayout(
        0, gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    )
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, A // 2, 16])
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    STATE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [8, 1, 1], [2, 1, 0])
    STATE_C: gl.constexpr = gl.SliceLayout(2, STATE)
    STATE_N: gl.constexpr = gl.SliceLayout(1, STATE)
    INNER: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    OWN_Y: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [8, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [64 // A, A // 2], [8, 1], [1, 0])
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    # the sums of in_proj: x beside z
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [64 // A, A // 2], [8, 1], [1, 0])
    # what the convolution keeps: a quarter of the channels of one row, and each has one thread
    KEPT: gl.constexpr = gl.BlockedLayout([1, C // 4], [8, 4], [8, 1], [1, 0])
    TURNS: gl.constexpr = H // DEEP // SIZES.STAGES
    # the squares of a few of the groups
    SQUARES: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    w_tiles, _, filled, freed = ring
    x_kept, gates, deltas, shares, inner_kept, y_kept = kept
    tokens_ptr, embeddings_ptr, gain_ptr = begin
    conv_ptr, ssm_ptr = states
    low_ptr, dt_ptr, y_ptr, gained_ptr, squares_ptr = told
    conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride = strides
    CONV_DTYPE: gl.constexpr = conv_ptr.dtype.element_ty

    pid = gl.program_id(0)
    first_c, first_row, first_o = pid * C, pid // GROUPS * OWN, pid % GROUPS * A
    own_rows = rows - first_row
    low_row, low_o = pid // LOW_GROUPS * LOW_ROWS, pid % LOW_GROUPS * LOW_HIGH
    low_rows = gl.minimum(rows - low_row, LOW_ROWS)
    like = _pairs(gl.zeros([ROWS, A], gl.float32, PAIRS))[0]
    dt_like = _pairs(gl.zeros([ROWS, A], gl.float32, MMA))[0]
    CONV: gl.constexpr = like.type.layout
    slots = ()
    for part in gl.static_range(PARTS):
        slots += (_slots(slots_ptr, part, rows, STATE),)
    kept_slots = _slots_of_windows(slots_ptr, rows, KEPT)

    # this program's part of the residual: the tokens' embeddings
    residual = _embedded(tokens_ptr, embeddings_ptr, first_row, first_o, rows, H, OWN, A, OUT)
    squares = _tell(residual, _gain(gain_ptr, first_o, A, OUT), gained_ptr, first_row, first_o, rows, H)
    b_out = pid % GROUPS * ROWS + first_row + gl.arange(0, OWN, layout=OUT_ROW)
    gl.store(squares_ptr + b_out, squares)

    target = 0
    for layer in range(layers):
        conv, ssm = (conv_ptr, conv_stride), (ssm_ptr, ssm_stride)
        entry = table_ptr + layer * FIELDS
        taps_at, bias_at, p_at = gl.load(entry + TAPS), gl.load(entry + CONV_BIAS), gl.load(entry + X_PROJ)
        decay_at, skip_at = gl.load(entry + DECAY), gl.load(entry + SKIP)
        dt_bias_at, next_gain_ptr = gl.load(entry + DT_BIAS), _bf16(gl.load(entry + GAIN))
        target += PROGRAMS
        _count(counter_ptr)
        home, mask = _home_of_windows(conv, kept_slots, first_c, rows, C, KEPT, SIZES)
        windows = _windows(home, mask, SIZES)
        _await(counter_ptr, target)
        mbarrier.arrive(go)

        # what is needed besides in_proj, while others make it
        recalled = _recall(windows, taps_at, bias_at, first_c, like, SIZES)
        home, mask = _home_of_windows(conv, kept_slots, first_c, rows, C, KEPT, SIZES)
        _move_on(home, mask, windows, SIZES)
        g, b = _indices_2d(32, ROWS, SQUARES)
        mask = gl.max_constancy((g < GROUPS) & (b >= 0), [1, 4])
        squares_read = gl.load(squares_ptr + (g * ROWS + b), mask=mask, other=0.0, cache_modifier=".cg")
        scale = _scale(squares_read, eps, like, H)
        mbarrier.wait(done, layer & 1)
        x, gate, newest = _convolve(sums.load(PAIRS), scale, recalled, CONV_DTYPE)
        b, c = _indices_2d(ROWS, C, CONV)
        gl.store(y_ptr + (b * D + first_c + c), x, mask=(b < rows) & (c >= 0))
        target += PROGRAMS
        _count(counter_ptr)
        x_kept.store(x)
        gates.store(gate)
        low_weights = _low_weights(p_at, low_o, gl.where(low_rows > 0, LOW_HIGH, 0), D)
        h = ()
        for part in gl.static_range(DEPTH):
            h += (_state(ssm, slots[part], first_c, part, rows, C, N, STATE),)
        _await(counter_ptr, target)

        low = _low_product(low_weights, y_ptr + low_row * D, low_rows, D)
        o, b = _indices_2d(LOW_HIGH, LOW_ROWS, LOW)
        low_at, mask = (low_row + b) * LOW_WIDTH + low_o + o, (b < low_rows) & (o >= 0)
        gl.store(low_ptr + low_at, low, mask=mask)
        gl.store(dt_ptr + low_at, low.to(gl.bfloat16), mask=mask)
        target += PROGRAMS
        _count(counter_ptr)
        constants = _constants_of_state(decay_at, skip_at, first_c, C, N, SIZES.SKIP_DTYPE, STATE)
        for part in gl.static_range(DEPTH, PARTS):
            h += (_state(ssm, slots[part], first_c, part, rows, C, N, STATE),)
        bias = _bias(dt_bias_at, first_c, dt_like)
        use = layer * (TURNS + 1) + TURNS
        _await(counter_ptr, target)

        b, r = _indices_2d(ROWS, DEEP, WHOLE)
        mask = gl.max_constancy((r < R) & (b < SPACE), [1, 8])
        dt_at = gl.multiple_of(dt_ptr + (b * LOW_WIDTH + r), [1, 16])
        low = gl.load(dt_at, mask=mask, other=0.0, cache_modifier=".cg")
        b, n = _indices_2d(ROWS, 2 * N, INNER)
        inner_at = gl.multiple_of(low_ptr + (b * LOW_WIDTH + R + n), [1, 16])
        inner = gl.load(
            inner_at, mask=gl.max_constancy((b < SPACE) & (n >= 0), [1, 4]), other=0.0, cache_modifier=".cg"
        )
        # where inputs were and will be
        x_tiles.index(0 + _nothing()).store(low)
        inner_kept.store(inner)
        fence_async_shared()
        _barrier()
        mbarrier.wait(filled.index(0), use & 1)
        nothing = _nothing()
        dt = gl.zeros([ROWS, A], gl.float32, MMA)
        dt = warpgroup_mma(x_tiles.index(nothing), w_tiles.index(nothing).permute((1, 0)), dt, is_async=True)
        dt = warpgroup_mma_wait(0, deps=(dt,))
        _barrier()
        mbarrier.arrive(freed.index(0))
        deltas.store(_delta(dt, bias))
        moved_states = ()
        for part in gl.static_range(PARTS):
            inner_part = inner_kept.slice(part * PART, PART)
            now = inner_part.slice(0, N, dim=1).load(STATE_N), inner_part.slice(N, N, dim=1).load(STATE_N)
            delta = deltas.slice(part * PART, PART).load(STATE_C)
            x = x_kept.slice(part * PART, PART).load(STATE_C)
            gate = gates.slice(part * PART, PART).load(STATE_C)
            moved, y = _moved(h[part], constants, now, delta, x, gate)
            y_kept.slice(part * PART, PART).store(y.to(gl.bfloat16))
            moved_states += (moved,)
        b, d = _indices_2d(SPACE, C, OWN_Y)
        y_at = gl.multiple_of(y_ptr + (b * D + first_c + d), [1, 16])
        mask = gl.max_constancy((b < rows) & (d >= 0), [1, 8])
        gl.store(y_at, y_kept.slice(0, SPACE).load(OWN_Y), mask=mask)
        target += PROGRAMS
        _count(counter_ptr)
        # what nobody waits for
        for part in gl.static_range(PARTS):
            _keep(ssm, slots[part], first_c, part, rows, moved_states[part], STATE)
        home, mask = _home_of_windows(conv, kept_slots, first_c, rows, C, KEPT, SIZES)
        _keep_newest(home, mask, gl.convert_layout(newest.to(CONV_DTYPE), KEPT), SIZES)
        gain = _gain(next_gain_ptr, first_o, A, OUT)
        _await(counter_ptr, target)

        more = _out_product(outs, shares, layer, y_ptr + first_row * D, own_rows, A, OWN, D)
        residual += gl.convert_layout(more, OUT)
        squares = _tell(residual, gain, gained_ptr, first_row, first_o, rows, H)
        gl.store(squares_ptr + b_out, squares)
        conv_ptr += conv_layer_stride
        ssm_ptr += ssm_layer_stride

    # nobody waits any more: the last one leaves the counter as it was
    if gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == target + PROGRAMS - 1:
        gl.store(counter_ptr, 0)


@gluon.jit(do_not_specialize=["rows", "layers", "eps"])
def persistent_narrow_kernel(
    table_ptr,
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    slots_ptr,
    conv_ptr,
    ssm_ptr,
    low_ptr,
    dt_ptr,
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
    SIZES: gl.constexpr,
):
    """gained [B, H] and squares [groups, 64] of the last residual for tokens [B], states in slots [B] moved on.

    table [layers, FIELDS] int64 addresses. low [64, R + 2 N] fp32, dt like low, y [B, D]: room for what programs tell
    each other. counter is zero before and after. A program has A outputs of in_proj and, for a quarter of the SPACE
    rows, of out_proj. Of the rows' states DEPTH parts are read beside x_proj, the others after it; all are written once
    y has been told.
    """
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    FLAT_3D: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [2, 1, 0])
    A: gl.constexpr = SIZES.A
    STAGES: gl.constexpr = SIZES.STAGES
    COPIERS: gl.constexpr = SIZES.COPIERS
    PIECES: gl.constexpr = SIZES.D // WIDE
    w_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, A, DEEP], TILES)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, DEEP], TILES)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [PIECES, WARPS, A, WIDE // WARPS], SWIZZLED)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    out_filled = gl.allocate_shared_memory(gl.int64, [PIECES, 1], mbarrier.MBarrierLayout())
    out_freed = gl.allocate_shared_memory(gl.int64, [PIECES, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=COPIERS * 32)
        mbarrier.init(freed.index(i), count=1)
        mbarrier.init(x_filled.index(i), count=COPIERS * 32)
        mbarrier.init(x_freed.index(i), count=1)
    for i in gl.static_range(PIECES):
        mbarrier.init(out_filled.index(i), count=COPIERS * 32)
        mbarrier.init(out_freed.index(i), count=1)
    mbarrier.init(go, count=1)
    mbarrier.init(done, count=1)
    ring, inputs = (w_tiles, w_tiles, filled, freed), (x_tiles, x_filled, x_freed)
    outs = (out_tiles, out_filled, out_freed)
    # rows of which threads of a warp hold neighbouring columns: in different banks
    sums = gl.allocate_shared_memory(gl.float32, [ROWS, A], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    x_kept = gl.allocate_shared_memory(gl.bfloat16, [ROWS, A // 2], FLAT)
    gates = gl.allocate_shared_memory(gl.float32, [ROWS, A // 2], FLAT)
    deltas = gl.allocate_shared_memory(gl.float32, [ROWS, A // 2], FLAT)
    shares = gl.allocate_shared_memory(gl.float32, [WARPS, A, SIZES.SPACE // QUARTERS], FLAT_3D)
    inner_kept = gl.allocate_shared_memory(gl.float32, [ROWS, 2 * SIZES.N], FLAT)
    y_kept = gl.allocate_shared_memory(gl.bfloat16, [ROWS, A // 2], FLAT)
    kept = (x_kept, gates, deltas, shares, inner_kept, y_kept)
    begin, states = (tokens_ptr, embeddings_ptr, gain_ptr), (conv_ptr, ssm_ptr)
    told = (low_ptr, dt_ptr, y_ptr, gained_ptr, squares_ptr)
    strides = (conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride)
    gl.warp_specialize(
        [
            (
                _advance,
                (
                    ring,
                    outs,
                    x_tiles,
                    go,
                    done,
                    sums,
                    kept,
                    table_ptr,
                    begin,
                    slots_ptr,
                    states,
                    told,
                    counter_ptr,
                    rows,
                    layers,
                    strides,
                    eps,
                    SIZES,
                ),
            ),
            (_make_products, (ring, inputs, (sums,), done, layers, SIZES)),
            (_copy_weights, (ring, outs, table_ptr, layers, SIZES)),
            (_copy_inputs, (inputs, go, gained_ptr, rows, layers, SIZES)),
        ],
        [4, COPIERS, COPIERS],
        [PRODUCT_REGISTERS, COPIER_REGISTERS, COPIER_REGISTERS],
    )
