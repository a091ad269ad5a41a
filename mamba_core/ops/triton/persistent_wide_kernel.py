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

from mamba_core.ops.triton.persistent import Begin, States, _await, _barrier, _bf16, _count, _layer
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d, _nothing
from mamba_core.ops.triton.persistent_wide_conv import (
    Own,
    _convolve,
    _counts,
    _keep_newest,
    _read_windows,
    _recall_and_move_on,
    _scales,
    _slots_of_windows,
)
from mamba_core.ops.triton.persistent_wide_parts import (
    PART,
    _bias,
    _constants_of_state,
    _delta,
    _dt_like,
    _inputs_of_state,
    _slots,
    _state,
)
from mamba_core.ops.triton.persistent_wide_phases import (
    OWN,
    Told,
    _add_shares,
    _advance_states,
    _embed,
    _gains,
    _in_place_of,
    _lows,
    _multiply_dt,
    _newest,
    _share_low,
    _share_out,
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
    states,
    told,
    counter_ptr,
    rows,
    layers,
    eps,
    SIZES: gl.constexpr,
):
    """What the first warps do: the step itself, but for its two large products."""
    N: gl.constexpr = SIZES.N
    COUNTS: gl.constexpr = _counts(SIZES)
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    STATE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [8, 1, 1], [2, 1, 0])
    IN_TURNS: gl.constexpr = SIZES.H // DEEP // SIZES.STAGES
    TURNS: gl.constexpr = IN_TURNS + SIZES.D // QUARTERS // DEEP // SIZES.STAGES
    # the squares of a few of the groups
    SQUARES: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    x_flat, gates = kept
    deltas, news = _in_place_of(sums, SIZES)
    conv_ptr, ssm_ptr = states.conv, states.ssm

    pid = gl.program_id(0)
    quarter, group = pid // GROUPS, pid % GROUPS
    own = Own(pid * (SIZES.D // PROGRAMS), quarter * OWN, group * (SIZES.H // GROUPS))
    quarter_ptr, group_ptr = counter_ptr + (1 + quarter) * FAR, counter_ptr + (1 + QUARTERS + group) * FAR
    # a channel of x_proj's tiles that is not there must count as zero
    x_flat.store(gl.zeros([ROWS, DEEP], gl.bfloat16, WHOLE))
    slots = ()
    for part in gl.static_range(SIZES.SPACE // PART):
        slots += (_slots(states.slots, part, rows, STATE),)
    kept_slots = _slots_of_windows(states.slots, rows, SIZES)
    residual = _embed(begin, told, own, rows, SIZES)

    target = 0
    for index in range(layers):
        conv, ssm = (conv_ptr, states.conv_stride), (ssm_ptr, states.ssm_stride)
        layer = _layer(table_ptr, index)
        target += PROGRAMS
        _count(counter_ptr)
        windows = _read_windows(conv, kept_slots, own, rows, SIZES)
        _await(counter_ptr, target)
        mbarrier.arrive(go)

        # what is needed besides in_proj, while others make it
        recalled = _recall_and_move_on(conv, kept_slots, windows, layer, own, rows, SIZES)
        g, b = _indices_2d(GROUPS, ROWS, SQUARES)
        squares = gl.load(told.squares + (g * ROWS + b), cache_modifier=".cg")
        scales = _scales(squares, eps, SIZES)
        mbarrier.wait(done, 0)
        for p in gl.static_range(len(COUNTS)):
            x, gate, newest = _convolve(sums[p], scales[p], recalled[p], conv_ptr.dtype.element_ty)
            x_flat.slice(p * (SIZES.A // 2), COUNTS[p], dim=1).store(x)
            gates[p].store(gate)
            news[p].store(newest)
        # for the matrix units, where inputs were and will be
        x_kept = x_tiles.index(SIZES.STAGES - 1 + _nothing())
        x_kept.store(x_flat.load(WHOLE))
        fence_async_shared()
        _barrier()
        use = index * (TURNS + 1) + IN_TURNS
        _share_low(ring, use, x_kept, told.shares, SIZES)
        target += PROGRAMS
        _count(counter_ptr)

        # the states of the next rows, piece after piece
        h = ()
        for part in gl.static_range(SIZES.DEPTH - 1):
            for p in gl.static_range(len(COUNTS)):
                h += (_state(ssm, slots[part], own.channel + p * (SIZES.A // 2), part, rows, COUNTS[p], N, STATE),)
        _await(counter_ptr, target)

        _sum_low(told, SIZES)
        target += PROGRAMS
        _count(counter_ptr)
        constants, biases = (), ()
        LAST: gl.constexpr = SIZES.DEPTH - 1
        for p in gl.static_range(len(COUNTS)):
            first = own.channel + p * (SIZES.A // 2)
            constants += (_constants_of_state(layer, first, COUNTS[p], N, SIZES.SKIP_DTYPE, STATE),)
            h += (_state(ssm, slots[LAST], first, LAST, rows, COUNTS[p], N, STATE),)
            biases += (_bias(layer.dt_bias, first, _dt_like(COUNTS[p])),)
        _await(counter_ptr, target)

        lows = _lows(told.dt, WHOLE, SIZES)
        inner = _inputs_of_state(told.low, 0, SIZES.R, N, gl.SliceLayout(1, STATE))
        dts = _multiply_dt(ring, use, x_tiles, lows, SIZES)
        for p in gl.static_range(len(COUNTS)):
            deltas[p].store(_delta(dts[p], biases[p]))
        _advance_states(ssm, slots, h, constants, inner, deltas, kept, told, own, rows, STATE, SIZES)
        _count(quarter_ptr)
        gains = _gains(_bf16(layer.gain), own, SIZES)
        newest_inputs = _newest(news, SIZES)
        _await(quarter_ptr, (index + 1) * GROUPS)
        mbarrier.arrive(go)

        # while others make out_proj
        _keep_newest(conv, kept_slots, newest_inputs, own, rows, SIZES)
        mbarrier.wait(done, 1)
        _share_out(sums, told.parts, own, rows, SIZES)
        _count(group_ptr)
        _await(group_ptr, (index + 1) * QUARTERS)
        residual = _add_shares(residual, gains, told, own, rows, SIZES)
        conv_ptr += states.conv_layer_stride
        ssm_ptr += states.ssm_layer_stride

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
    begin = Begin(tokens_ptr, embeddings_ptr, gain_ptr)
    states = States(conv_ptr, ssm_ptr, conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride, slots_ptr)
    told = Told(shares_ptr, low_ptr, dt_ptr, y_ptr, parts_ptr, gained_ptr, squares_ptr)
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
                    states,
                    told,
                    counter_ptr,
                    rows,
                    layers,
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
