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

from mamba_core.ops.triton.persistent import (
    COPIER_REGISTERS,
    FIELDS,
    IN_BIAS,
    OUT_BIAS,
    Begin,
    States,
    _await,
    _barriers,
    _count,
    _leave,
    _share,
)
from mamba_core.ops.triton.persistent_rows_conv import (
    _convolve,
    _in_biases,
    _keep_x,
    _move_on,
    _past,
    _scale,
    _small,
    _weights_of_conv,
)
from mamba_core.ops.triton.persistent_rows_parts import (
    Kept,
    Told,
    _begin,
    _constants_of_channels,
    _decay,
    _gain,
    _inputs_of_state,
    _keep_states,
    _layout_of_states,
    _layout_of_sums,
    _of_group,
    _out_bias,
    _own_sums,
    _slots,
    _squares,
    _state,
    _tell,
    _weights_of_states,
)
from mamba_core.ops.triton.persistent_rows_phases import (
    _advance_states,
    _keep_gate,
    _keep_low,
    _multiply_dt,
    _multiply_out,
    _share_low,
    _sum_low,
)
from mamba_core.ops.triton.persistent_rows_tiles import (
    HIGH,
    _copy_weights,
    _indices_3d,
    _inputs,
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
    begin,
    states,
    told,
    counter_ptr,
    rows,
    layers,
    eps,
    inner_eps,
    SIZES: gl.constexpr,
):
    """What the warps that multiply do: the step itself."""
    WIDE: gl.constexpr = SIZES.WIDE
    H: gl.constexpr = SIZES.H
    BLOCK_B: gl.constexpr = SIZES.BLOCK_B
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    BLOCK_N: gl.constexpr = SIZES.BLOCK_N
    O_SPACE: gl.constexpr = SIZES.O_SPACE
    PROGRAMS: gl.constexpr = SIZES.PROGRAMS
    C_SPACE: gl.constexpr = BLOCK_C // HIGH
    # whether the convolution's past is read a phase ahead: with more rows, a thread has no registers for that
    EARLY: gl.constexpr = BLOCK_B == 8
    # [tiles, warps, 16, B] of sums and what is left without the warps: channels, rows of the residual
    C_SUMS: gl.constexpr = _layout_of_sums(C_SPACE, BLOCK_B, SIZES.WARPS)
    CHANNEL: gl.constexpr = gl.SliceLayout(1, C_SUMS)
    O_SUMS: gl.constexpr = _layout_of_sums(O_SPACE, BLOCK_B, SIZES.WARPS)
    OUTPUT: gl.constexpr = gl.SliceLayout(1, O_SUMS)
    STATE: gl.constexpr = _layout_of_states(SIZES)

    pid = gl.program_id(0)
    begin, states, told, counter_ptr = _of_group(begin, states, told, counter_ptr, SIZES)
    rows = gl.minimum(rows - gl.program_id(1) * BLOCK_B, BLOCK_B)
    own_c = _own_channels(SIZES)
    own_o = _share(H, PROGRAMS)
    own_l = _share((SIZES.R + 2 * SIZES.N) * BLOCK_B // 4, PROGRAMS)
    conv_ptr, ssm_ptr = states.conv, states.ssm

    # where each row's state lives
    conv_slot = _slots(states.slots, _indices_3d(C_SPACE, HIGH, BLOCK_B, CHANNEL)[2], rows)
    ssm_slots = ()
    for part in gl.static_range(BLOCK_B // 8):
        ssm_slots += (_slots(states.slots, part * 8 + _indices_3d(8, BLOCK_C, BLOCK_N, STATE)[0], rows),)
    residual, gain = _begin(begin, own_o, rows, OUTPUT, SIZES)
    _tell(residual, gain, told, own_o, rows, OUTPUT, SIZES)

    if EARLY:
        small = _small(_weights_of_conv(table_ptr), (conv_ptr, states.conv_stride), conv_slot, own_c, rows, SIZES)

    at = (pid * 0, pid * 0)
    target = 0
    for layer in range(layers):
        entry = table_ptr + layer * FIELDS
        if EARLY:
            conv_weights = _weights_of_conv(table_ptr + gl.minimum(layer + 1, layers - 1) * FIELDS)
        else:
            conv_weights = _weights_of_conv(entry)
        in_bias_at, out_bias_at = gl.load(entry + IN_BIAS), gl.load(entry + OUT_BIAS)
        if EARLY:
            weights = _weights_of_states(entry)
        conv, ssm = (conv_ptr, states.conv_stride), (ssm_ptr, states.ssm_stride)
        target += PROGRAMS
        _count(counter_ptr)
        # what is small and this program's own, on its way while it waits
        if not EARLY:
            past, newest, columns = _past(conv_weights, conv, conv_slot, own_c, rows, SIZES)
        if SIZES.HAS_BIAS:
            x_bias, z_bias = _in_biases(in_bias_at, own_c, SIZES)
            residual += _out_bias(out_bias_at, own_o, rows, OUTPUT, SIZES)
        _await(counter_ptr, target)

        hidden = ()
        for j in gl.static_range(H // WIDE):
            hidden += (_inputs(told.gained, j * WIDE, rows, WIDE, H, BLOCK_B, SIZES.WARPS),)
        squares = _squares(told.squares, SIZES)
        at = _multiply_rows(ring, at, hidden, sums, 0, SIZES.C_TILES, SIZES)
        scale = _scale(squares, eps, SIZES)
        x = _total(sums, C_SPACE, C_SUMS, SIZES) * scale
        if SIZES.HAS_BIAS:
            x += x_bias
        new = x.to(conv_ptr.dtype.element_ty)
        if EARLY:
            columns = small
            x = _convolve(small, new, SIZES)
        else:
            x = past + new.to(gl.float32) * newest
        x = _keep_x(x, kept.x, own_c, rows, SIZES)
        if not EARLY:
            weights = _weights_of_states(entry)
        at = _share_low(ring, at, x, told.shares, pid, SIZES)
        target += PROGRAMS
        _count(counter_ptr)

        # by now every thread has read what was there, also one that holds an element beside others
        _move_on(conv, conv_slot, columns, new, own_c, rows, SIZES)
        # what the recurrence needs and no other program writes
        a = _decay(weights, own_c, SIZES)
        h = (_state(ssm, ssm_slots[0], own_c, STATE, SIZES),)
        constants = (a, _constants_of_channels(weights, own_c, SIZES))
        gain = _gain(weights, own_o, OUTPUT, SIZES)
        at = _multiply_rows(ring, at, hidden, sums, 0, SIZES.Z_TILES, SIZES)

        _await(counter_ptr, target)
        _sum_low(told, own_l, SIZES)
        target += PROGRAMS
        _count(counter_ptr)

        at = _multiply_rows(ring, at, hidden, sums, SIZES.Z_TILES, SIZES.C_TILES, SIZES)
        z = _total(sums, C_SPACE, C_SUMS, SIZES) * scale
        if SIZES.HAS_BIAS:
            z += z_bias
        _keep_gate(z, kept.z, SIZES)

        _await(counter_ptr, target)
        power = _keep_low(told.low, kept.low, SIZES)
        inner = _inputs_of_state(told.low, 0, SIZES)
        at = _multiply_dt(ring, at, kept, power, inner_eps, SIZES)
        moved = _advance_states(ssm, ssm_slots, h, constants, inner, kept, told, own_c, rows, inner_eps, SIZES)
        target += PROGRAMS
        _count(counter_ptr)
        _keep_states(ssm, ssm_slots, moved, own_c, rows, SIZES)
        if EARLY:
            # of the layer that follows; behind the last, of none that is
            next_ptr = conv_ptr + gl.where(layer + 1 < layers, states.conv_layer_stride, 0)
            small = _small(conv_weights, (next_ptr, states.conv_stride), conv_slot, own_c, rows, SIZES)
        _await(counter_ptr, target)

        at = _multiply_out(ring, at, told.y, rows, sums, SIZES)
        residual += _own_sums(sums, own_o, rows, O_SUMS, SIZES)
        _tell(residual, gain, told, own_o, rows, OUTPUT, SIZES)
        conv_ptr += states.conv_layer_stride
        ssm_ptr += states.ssm_layer_stride

    _leave(counter_ptr, target, PROGRAMS)


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
    filled, freed = _barriers(STAGES, SIZES.COPIERS)
    ring = (tiles, filled, freed)
    sums = gl.allocate_shared_memory(gl.float32, [SPACE, WARPS, HIGH, BLOCK_B], FLAT)
    kept = Kept(
        gl.allocate_shared_memory(gl.bfloat16, [BLOCK_B, BLOCK_C], FLAT_2D),
        gl.allocate_shared_memory(gl.float32, [BLOCK_B, BLOCK_C], FLAT_2D),
        gl.allocate_shared_memory(gl.float32, [BLOCK_C, BLOCK_B], FLAT_2D),
        gl.allocate_shared_memory(gl.bfloat16, [DT_STAGES, BLOCK_B, LOW_ROWS], SWIZZLED_2D),
    )
    begin = Begin(tokens_ptr, embeddings_ptr, gain_ptr)
    states = States(conv_ptr, ssm_ptr, conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride, slots_ptr)
    told = Told(shares_ptr, low_ptr, y_ptr, gained_ptr, squares_ptr)
    gl.warp_specialize(
        [
            (
                _advance,
                (ring, sums, kept, table_ptr, begin, states, told, counter_ptr, rows, layers, eps, inner_eps, SIZES),
            ),
            (_copy_weights, (ring, table_ptr, layers, SIZES)),
        ],
        [COPIERS],
        [COPIER_REGISTERS],
    )
