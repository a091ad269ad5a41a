"""One token each of up to 64 sequences through all layers in a single launch: a Gluon kernel, for Hopper GPUs.

As in ``persistent_rows_kernel``, programs stay for the whole step, and warps of their own copy weights ahead of their
use, also while the programs wait for each other. For so many rows what weights are multiplied with weighs as much as
the weights, so it has a ring too, filled by warps that start as soon as they are told that it is there. Four more warps
make the two large products, on the matrix units with both operands in shared memory, the rows as the operand that is 64
high: eight would issue as many instructions for tiles half as wide. They know the slots of the rings when they are
compiled, since each large product takes whole turns.

128 programs: each has D / 128 channels, of which in_proj makes x and z at once. x_proj is split by its columns, as
there: a program has those of its own channels. out_proj is split by quarters of its columns and by 32 groups of
outputs, so that a program reads a quarter of y; the four programs of a group exchange their shares, by 16 rows each.
A layer has five waits:

    in_proj, convolution and SiLU, x_proj -> shares, counted and awaited
    shares added up in their order -> low, counted and awaited
    dt_proj, recurrence, gate -> y, counted and awaited among 32 programs
    out_proj -> parts, counted and awaited among 4
    residual, squares for the norm -> gained, counted and awaited
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from mamba_core.ops.triton.persistent import (
    CONV_BIAS,
    DECAY,
    DT_BIAS,
    FIELDS,
    GAIN,
    SKIP,
    TAPS,
    _await,
    _barrier,
    _bf16,
    _count,
    _view,
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
    _inputs_of_state,
    _keep_newest,
    _move_on,
    _pairs,
    _recall,
    _scale,
    _share,
    _shared,
    _slots,
    _slots_of_windows,
    _state,
    _tell,
    _windows,
)
from mamba_core.ops.triton.persistent_wide_phases import (
    Told,
    _advance_states,
    _lows,
    _multiply_dt,
    _share_low,
    _sum_low,
)
from mamba_core.ops.triton.persistent_wide_tiles import (
    DEEP,
    GROUPS,
    PROGRAMS,
    QUARTERS,
    ROWS,
    TILES,
    _copy_inputs,
    _copy_weights,
    _make_products,
)

# rows of the residual that a program has
OWN = gl.constexpr(16)
# how far the counters lie apart: one of all programs, then those of the quarters and of the groups
FAR = gl.constexpr(32)
COUNTERS = gl.constexpr(1 + 4 + 32)
# of a thread that makes products, and of one that copies; the others share what is left
PRODUCT_REGISTERS = gl.constexpr(80)
COPIER_REGISTERS = gl.constexpr(48)


@gluon.jit
def _advance(
    ring,
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
    """What the first warps do: the step itself, but for its two large products."""
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    R: gl.constexpr = SIZES.R
    N: gl.constexpr = SIZES.N
    A: gl.constexpr = SIZES.A
    B: gl.constexpr = SIZES.B
    SPACE: gl.constexpr = SIZES.SPACE
    STAGES: gl.constexpr = SIZES.STAGES
    DEPTH: gl.constexpr = SIZES.DEPTH
    C: gl.constexpr = D // PROGRAMS
    CA: gl.constexpr = A // 2
    CB: gl.constexpr = B // 2
    COUNTS: gl.constexpr = (CA, CB)
    PIECES: gl.constexpr = 2 if B > 0 else 1
    MMA_A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, A // 2, 16])
    MMA_B: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 8, 16])
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    STATE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [8, 1, 1], [2, 1, 0])
    STATE_N: gl.constexpr = gl.SliceLayout(1, STATE)
    OUT_A: gl.constexpr = gl.BlockedLayout([1, 4], [128 // A, A // 4], [8, 1], [1, 0])
    OUT_B: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [8, 1], [1, 0])
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT_A)
    # the sums of the large products: x beside z, and four outputs
    PAIRS_A: gl.constexpr = gl.BlockedLayout([1, 2], [64 // A, A // 2], [8, 1], [1, 0])
    PAIRS_B: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [8, 1], [1, 0])
    SUMS_A: gl.constexpr = gl.BlockedLayout([1, 4], [128 // A, A // 4], [8, 1], [1, 0])
    SUMS_B: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0])
    PAIRS: gl.constexpr = (PAIRS_A, PAIRS_B)
    SUMS: gl.constexpr = (SUMS_A, SUMS_B)
    # what the convolution keeps: a quarter of the channels of one row, and each has one thread
    KEPT_A: gl.constexpr = gl.BlockedLayout([1, CA // 4], [8, 4], [8, 1], [1, 0])
    KEPT_B: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [8, 1], [1, 0])
    KEPT: gl.constexpr = (KEPT_A, KEPT_B)
    IN_TURNS: gl.constexpr = H // DEEP // STAGES
    TURNS: gl.constexpr = IN_TURNS + D // QUARTERS // DEEP // STAGES
    # the squares of a few of the groups
    SQUARES: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    x_flat, gates = kept
    # in the sums' place, once they have been read
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    halves = _view(sums[0], gl.float32, [2, ROWS, CA], FLAT)
    deltas, news = (halves.index(0),), (halves.index(1),)
    if B > 0:
        halves_rest = _view(sums[1], gl.float32, [2, ROWS, 8], FLAT)
        deltas, news = (deltas[0], halves_rest.index(0)), (news[0], halves_rest.index(1))
    tokens_ptr, embeddings_ptr, gain_ptr = begin
    conv_ptr, ssm_ptr = states
    conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride = strides
    CONV_DTYPE: gl.constexpr = conv_ptr.dtype.element_ty

    pid = gl.program_id(0)
    first_c, quarter, group = pid * C, pid // GROUPS, pid % GROUPS
    first_row, first_o = quarter * OWN, group * (H // GROUPS)
    quarter_ptr, group_ptr = counter_ptr + (1 + quarter) * FAR, counter_ptr + (1 + QUARTERS + group) * FAR
    # a channel of x_proj's tiles that is not there must count as zero
    x_flat.store(gl.zeros([ROWS, DEEP], gl.bfloat16, WHOLE))
    likes = (
        _pairs(gl.zeros([ROWS, A], gl.float32, PAIRS_A))[0],
        _pairs(gl.zeros([ROWS, 16], gl.float32, PAIRS_B))[0],
    )
    dt_likes = (
        _pairs(gl.zeros([ROWS, A], gl.float32, MMA_A))[0],
        _pairs(gl.zeros([ROWS, 16], gl.float32, MMA_B))[0],
    )
    slots = ()
    for part in gl.static_range(SPACE // PART):
        slots += (_slots(slots_ptr, part, rows, STATE),)

    kept_slots = (_slots_of_windows(slots_ptr, rows, KEPT_A),)
    if B > 0:
        kept_slots += (_slots_of_windows(slots_ptr, rows, KEPT_B),)

    # this program's part of the residual: the tokens' embeddings
    residual = _embedded(tokens_ptr, embeddings_ptr, first_row, first_o, rows, H, OWN, A, OUT_A)
    squares = _tell(residual, _gain(gain_ptr, first_o, A, OUT_A), told.gained, first_row, first_o, rows, H)
    rest = gl.zeros([OWN, 16], gl.float32, OUT_B)
    if B > 0:
        rest += _embedded(tokens_ptr, embeddings_ptr, first_row, first_o + A, rows, H, OWN, B, OUT_B)
        more = _tell(rest, _gain(gain_ptr, first_o + A, B, OUT_B), told.gained, first_row, first_o + A, rows, H)
        squares += gl.convert_layout(more, OUT_ROW)
    b_out = group * ROWS + first_row + gl.arange(0, OWN, layout=OUT_ROW)
    gl.store(told.squares + b_out, squares)

    target = 0
    for layer in range(layers):
        conv, ssm = (conv_ptr, conv_stride), (ssm_ptr, ssm_stride)
        entry = table_ptr + layer * FIELDS
        taps_at, bias_at = gl.load(entry + TAPS), gl.load(entry + CONV_BIAS)
        decay_at, skip_at = gl.load(entry + DECAY), gl.load(entry + SKIP)
        dt_bias_at, next_gain_ptr = gl.load(entry + DT_BIAS), _bf16(gl.load(entry + GAIN))
        target += PROGRAMS
        _count(counter_ptr)
        windows = ()
        for p in gl.static_range(PIECES):
            home, mask = _home_of_windows(conv, kept_slots[p], first_c + p * CA, rows, COUNTS[p], KEPT[p], SIZES)
            windows += (_windows(home, mask, SIZES),)
        _await(counter_ptr, target)
        mbarrier.arrive(go)

        # what is needed besides in_proj, while others make it
        recalled = ()
        for p in gl.static_range(PIECES):
            first = first_c + p * CA
            recalled += (_recall(windows[p], taps_at, bias_at, first, likes[p], SIZES),)
            home, mask = _home_of_windows(conv, kept_slots[p], first, rows, COUNTS[p], KEPT[p], SIZES)
            _move_on(home, mask, windows[p], SIZES)
        g, b = _indices_2d(GROUPS, ROWS, SQUARES)
        squares_read = gl.load(told.squares + (g * ROWS + b), cache_modifier=".cg")
        scales = ()
        for p in gl.static_range(PIECES):
            scales += (_scale(squares_read, eps, likes[p], H),)
        mbarrier.wait(done, 0)
        for p in gl.static_range(PIECES):
            acc = sums[p].load(PAIRS[p])
            x, gate, newest = _convolve(acc, scales[p], recalled[p], CONV_DTYPE)
            x_flat.slice(p * CA, COUNTS[p], dim=1).store(x)
            gates[p].store(gate)
            news[p].store(newest)
        # for the matrix units, where inputs were and will be
        x_kept = x_tiles.index(STAGES - 1 + _nothing())
        x_kept.store(x_flat.load(WHOLE))
        fence_async_shared()
        _barrier()
        use = layer * (TURNS + 1) + IN_TURNS
        _share_low(ring, use, x_kept, told.shares, SIZES)
        target += PROGRAMS
        _count(counter_ptr)

        # the states of the next rows, piece after piece
        h = ()
        for part in gl.static_range(DEPTH - 1):
            h += (_state(ssm, slots[part], first_c, part, rows, CA, N, STATE),)
            if B > 0:
                h += (_state(ssm, slots[part], first_c + CA, part, rows, CB, N, STATE),)
        _await(counter_ptr, target)

        _sum_low(told, SIZES)
        target += PROGRAMS
        _count(counter_ptr)
        constants, biases = (), ()
        for p in gl.static_range(PIECES):
            first = first_c + p * CA
            constants += (_constants_of_state(decay_at, skip_at, first, COUNTS[p], N, SIZES.SKIP_DTYPE, STATE),)
            h += (_state(ssm, slots[DEPTH - 1], first, DEPTH - 1, rows, COUNTS[p], N, STATE),)
            biases += (_bias(dt_bias_at, first, dt_likes[p]),)
        _await(counter_ptr, target)

        lows = _lows(told.dt, WHOLE, SIZES)
        inner = _inputs_of_state(told.low, 0, R, N, STATE_N)
        dts = _multiply_dt(ring, use, x_tiles, lows, SIZES)
        for p in gl.static_range(PIECES):
            deltas[p].store(_delta(dts[p], biases[p]))
        _advance_states(ssm, slots, h, constants, inner, deltas, kept, told, rows, STATE, SIZES)
        _count(quarter_ptr)
        gain = _gain(next_gain_ptr, first_o, A, OUT_A)
        if B > 0:
            gain_rest = _gain(next_gain_ptr, first_o + A, B, OUT_B)
        newest_inputs = ()
        for p in gl.static_range(PIECES):
            newest_inputs += (news[p].load(KEPT[p]),)
        _await(quarter_ptr, (layer + 1) * GROUPS)
        mbarrier.arrive(go)

        # while others make out_proj
        for p in gl.static_range(PIECES):
            home, mask = _home_of_windows(conv, kept_slots[p], first_c + p * CA, rows, COUNTS[p], KEPT[p], SIZES)
            _keep_newest(home, mask, newest_inputs[p], SIZES)
        mbarrier.wait(done, 1)
        for p in gl.static_range(PIECES):
            share = sums[p].load(SUMS[p])
            _share(share, told.parts + quarter * (ROWS * H), first_o + p * A, rows, H)
        _count(group_ptr)
        _await(group_ptr, (layer + 1) * QUARTERS)
        residual += _shared(told.parts, first_row, first_o, rows, H, OWN, A, OUT_A)
        squares_told = _tell(residual, gain, told.gained, first_row, first_o, rows, H)
        if B > 0:
            rest += _shared(told.parts, first_row, first_o + A, rows, H, OWN, B, OUT_B)
            more_told = _tell(rest, gain_rest, told.gained, first_row, first_o + A, rows, H)
            squares_told += gl.convert_layout(more_told, OUT_ROW)
        gl.store(told.squares + b_out, squares_told)
        conv_ptr += conv_layer_stride
        ssm_ptr += ssm_layer_stride

    # nobody waits any more: the last one leaves the counters as they were
    if gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == target + PROGRAMS - 1:
        i = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [8], [0]))
        gl.store(counter_ptr + i * FAR, gl.zeros_like(i), mask=i < COUNTERS)


@gluon.jit(do_not_specialize=["rows", "layers", "eps"])
def persistent_wide_kernel(
    table_ptr,
    tokens_ptr,
    embeddings_ptr,
    gain_ptr,
    slots_ptr,
    conv_ptr,
    ssm_ptr,
    shares_ptr,
    low_ptr,
    dt_ptr,
    y_ptr,
    parts_ptr,
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
    """gained [B, H] and squares [32, 64] of the last residual for tokens [B], states in slots [B] moved on.

    table [layers, FIELDS] int64 addresses. shares [128, 64, R + 2 N], low [64, R + 2 N] and parts [4, 64, H] fp32, dt
    like low, y [B, D]: room for what programs tell each other. counters are zero before and after.
    """
    A: gl.constexpr = SIZES.A
    STAGES: gl.constexpr = SIZES.STAGES
    COPIERS: gl.constexpr = SIZES.COPIERS
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    a_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, A, DEEP], TILES)
    b_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 16, DEEP], TILES) if SIZES.B > 0 else a_tiles
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, DEEP], TILES)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=COPIERS * 32)
        mbarrier.init(freed.index(i), count=1)
        mbarrier.init(x_filled.index(i), count=COPIERS * 32)
        mbarrier.init(x_freed.index(i), count=1)
    mbarrier.init(go, count=1)
    mbarrier.init(done, count=1)
    ring, inputs = (a_tiles, b_tiles, filled, freed), (x_tiles, x_filled, x_freed)
    # rows of which threads of a warp hold neighbouring columns: in different banks
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    SUMS_REST: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    sums = (gl.allocate_shared_memory(gl.float32, [ROWS, A], SUMS),)
    x_flat = gl.allocate_shared_memory(gl.bfloat16, [ROWS, DEEP], FLAT)
    gates = (gl.allocate_shared_memory(gl.float32, [ROWS, A // 2], FLAT),)
    if SIZES.B > 0:
        sums += (gl.allocate_shared_memory(gl.float32, [ROWS, 16], SUMS_REST),)
        gates += (gl.allocate_shared_memory(gl.float32, [ROWS, 8], FLAT),)
    kept = (x_flat, gates)
    begin, states = (tokens_ptr, embeddings_ptr, gain_ptr), (conv_ptr, ssm_ptr)
    told = Told(shares_ptr, low_ptr, dt_ptr, y_ptr, parts_ptr, gained_ptr, squares_ptr)
    strides = (conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride)
    gl.warp_specialize(
        [
            (
                _advance,
                (
                    ring,
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
            (_make_products, (ring, inputs, sums, done, layers, SIZES)),
            (_copy_weights, (ring, table_ptr, layers, SIZES)),
            (_copy_inputs, (inputs, go, gained_ptr, y_ptr, rows, layers, SIZES)),
        ],
        [4, COPIERS, COPIERS],
        [PRODUCT_REGISTERS, COPIER_REGISTERS, COPIER_REGISTERS],
    )
