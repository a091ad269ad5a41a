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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mamba_core.ops.triton.persistent import Begin, States, _await, _bf16, _count, _layer, _leave
from mamba_core.ops.triton.persistent_narrow_phases import (
    Kept,
    Told,
    _advance_states,
    _multiply_dt,
    _tell_low,
    _tell_x,
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
from mamba_core.ops.triton.persistent_rows_tiles import _indices_2d
from mamba_core.ops.triton.persistent_wide_conv import (
    Own,
    _convolve,
    _home_of_windows,
    _read_windows,
    _recall_and_move_on,
    _scales,
    _slots_of_windows,
    _write_newest,
)
from mamba_core.ops.triton.persistent_wide_parts import (
    PART,
    _bias,
    _constants_of_state,
    _delta,
    _dt_like,
    _embedded,
    _gain,
    _keep,
    _slots,
    _state,
    _tell,
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
    states,
    told,
    counter_ptr,
    rows,
    layers,
    eps,
    SIZES: gl.constexpr,
):
    """What the first warps do: the step itself, but for in_proj."""
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    N: gl.constexpr = SIZES.N
    A: gl.constexpr = SIZES.A
    DEPTH: gl.constexpr = SIZES.DEPTH
    C: gl.constexpr = A // 2
    GROUPS: gl.constexpr = H // A
    PROGRAMS: gl.constexpr = QUARTERS * GROUPS
    OWN: gl.constexpr = SIZES.SPACE // QUARTERS
    PARTS: gl.constexpr = SIZES.SPACE // PART
    LOW_GROUPS: gl.constexpr = (SIZES.R + 2 * N) // LOW_HIGH
    STATE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [8, 1, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [64 // A, A // 2], [8, 1], [1, 0])
    TURNS: gl.constexpr = H // DEEP // SIZES.STAGES
    # the squares of a few of the groups
    SQUARES: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
    conv_ptr, ssm_ptr = states.conv, states.ssm

    pid = gl.program_id(0)
    own = Own(pid * C, pid // GROUPS * OWN, pid % GROUPS * A)
    own_rows = rows - own.row
    low_row, low_o = pid // LOW_GROUPS * LOW_ROWS, pid % LOW_GROUPS * LOW_HIGH
    low_rows = gl.minimum(rows - low_row, LOW_ROWS)
    slots = ()
    for part in gl.static_range(PARTS):
        slots += (_slots(states.slots, part, rows, STATE),)
    kept_slots = _slots_of_windows(states.slots, rows, SIZES)

    # this program's part of the residual: the tokens' embeddings
    residual = _embedded(begin.tokens, begin.embeddings, own.row, own.output, rows, H, OWN, A, OUT)
    squares = _tell(residual, _gain(begin.gain, own.output, A, OUT), told.gained, own.row, own.output, rows, H)
    b_out = pid % GROUPS * ROWS + own.row + gl.arange(0, OWN, layout=gl.SliceLayout(1, OUT))
    gl.store(told.squares + b_out, squares)

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
        g, b = _indices_2d(32, ROWS, SQUARES)
        mask = gl.max_constancy((g < GROUPS) & (b >= 0), [1, 4])
        squares = gl.load(told.squares + (g * ROWS + b), mask=mask, other=0.0, cache_modifier=".cg")
        scales = _scales(squares, eps, SIZES)
        mbarrier.wait(done, index & 1)
        x, gate, newest = _convolve(sums, scales[0], recalled[0], conv_ptr.dtype.element_ty)
        _tell_x(x, told.y, own, rows, D)
        target += PROGRAMS
        _count(counter_ptr)
        kept.x.store(x)
        kept.gates.store(gate)
        low_weights = _low_weights(layer.x_proj, low_o, gl.where(low_rows > 0, LOW_HIGH, 0), D)
        h = ()
        for part in gl.static_range(DEPTH):
            h += (_state(ssm, slots[part], own.channel, part, rows, C, N, STATE),)
        _await(counter_ptr, target)

        low = _low_product(low_weights, told.y + low_row * D, low_rows, D)
        _tell_low(low, told, low_row, low_o, low_rows, SIZES)
        target += PROGRAMS
        _count(counter_ptr)
        constants = _constants_of_state(layer, own.channel, C, N, SIZES.SKIP_DTYPE, STATE)
        for part in gl.static_range(DEPTH, PARTS):
            h += (_state(ssm, slots[part], own.channel, part, rows, C, N, STATE),)
        bias = _bias(layer.dt_bias, own.channel, _dt_like(C))
        _await(counter_ptr, target)

        dt = _multiply_dt(ring, index * (TURNS + 1) + TURNS, x_tiles, told, kept.inner, SIZES)
        kept.deltas.store(_delta(dt, bias))
        moved = _advance_states(h, constants, kept, told.y, own, rows, STATE, SIZES)
        target += PROGRAMS
        _count(counter_ptr)
        # what nobody waits for
        for part in gl.static_range(PARTS):
            _keep(ssm, slots[part], own.channel, part, rows, moved[part], STATE)
        home, mask = _home_of_windows(conv, kept_slots, own, 0, rows, SIZES)
        newest = gl.convert_layout(newest.to(home.dtype.element_ty), home.type.layout)
        _write_newest(home, mask, newest, SIZES)
        gain = _gain(_bf16(layer.gain), own.output, A, OUT)
        _await(counter_ptr, target)

        more = _out_product(outs, kept.shares, index, told.y + own.row * D, own_rows, A, OWN, D)
        residual += gl.convert_layout(more, OUT)
        squares = _tell(residual, gain, told.gained, own.row, own.output, rows, H)
        gl.store(told.squares + b_out, squares)
        conv_ptr += states.conv_layer_stride
        ssm_ptr += states.ssm_layer_stride

    _leave(counter_ptr, target, PROGRAMS)


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
    kept = Kept(x_kept, gates, deltas, shares, inner_kept, y_kept)
    begin = Begin(tokens_ptr, embeddings_ptr, gain_ptr)
    states = States(conv_ptr, ssm_ptr, conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride, slots_ptr)
    told = Told(low_ptr, dt_ptr, y_ptr, gained_ptr, squares_ptr)
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
                    states,
                    told,
                    counter_ptr,
                    rows,
                    layers,
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
