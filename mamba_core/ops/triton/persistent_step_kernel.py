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

from mamba_core.ops.triton.persistent import (
    COPIER_REGISTERS,
    FIELDS,
    Begin,
    States,
    _await,
    _barriers,
    _count,
    _leave,
    _share,
)
from mamba_core.ops.triton.persistent_step_parts import (
    Products,
    Told,
    _advance_state,
    _begin,
    _biases,
    _constants_of_state,
    _convolve,
    _dt_places,
    _layout_of_state,
    _own,
    _own_state,
    _own_weights,
    _past,
    _scales,
    _tell,
)
from mamba_core.ops.triton.persistent_step_tiles import _copy_weights, _inputs, _multiply, _total


@gluon.jit
def _advance(
    ring,
    sums,
    x_kept,
    table_ptr,
    begin,
    states,
    told,
    counter_ptr,
    layers,
    eps,
    inner_eps,
    SIZES: gl.constexpr,
):
    """What the warps that multiply do: the step itself."""
    H: gl.constexpr = SIZES.H
    D: gl.constexpr = SIZES.D
    BLOCK_C: gl.constexpr = SIZES.BLOCK_C
    BLOCK_O: gl.constexpr = SIZES.BLOCK_O
    BLOCK_P: gl.constexpr = SIZES.BLOCK_P
    PROGRAMS: gl.constexpr = SIZES.PROGRAMS
    WARPS: gl.constexpr = SIZES.WARPS
    LOW_WIDTH: gl.constexpr = SIZES.R + 2 * SIZES.N
    SHARES: gl.constexpr = 2
    WIDE_SHARES: gl.constexpr = 4
    # channels and their sums; rows of the residual, of low
    CHANNELS: gl.constexpr = gl.BlockedLayout([1, SHARES], [32, 1], [WARPS, 1], [1, 0])
    OUTPUTS: gl.constexpr = gl.BlockedLayout([1, WIDE_SHARES], [32, 1], [WARPS, 1], [1, 0])
    STATE: gl.constexpr = _layout_of_state(WARPS)

    pid = gl.program_id(0)
    own_c, own_p, own_o = _share(D, PROGRAMS), _share(LOW_WIDTH, PROGRAMS), _share(H, PROGRAMS)
    channels = _own(own_c, BLOCK_C, gl.SliceLayout(1, CHANNELS))
    outputs = _own(own_o, BLOCK_O, gl.SliceLayout(1, OUTPUTS))
    lows = _own(own_p, BLOCK_P, gl.SliceLayout(1, OUTPUTS))
    state_channels = _own(own_c, BLOCK_C, gl.SliceLayout(1, STATE))
    tile, mask = _own_state(state_channels, SIZES)
    dt_places = _dt_places(SIZES)
    each = gl.arange(0, 256, layout=gl.BlockedLayout([8], [32], [WARPS], [0]))
    token, home = gl.load(begin.tokens), gl.load(states.slots)
    CHANNEL_STRIDE: gl.constexpr = 1 if SIZES.TAP_MAJOR else SIZES.K - 1
    conv_ptr = states.conv + (home * states.conv_stride + channels.first * CHANNEL_STRIDE)
    ssm_ptr = states.ssm + home * states.ssm_stride
    residual = _begin(begin, token, told, outputs, H)

    at = (pid * 0, pid * 0)
    target = 0
    for layer in range(layers):
        target += PROGRAMS
        _count(counter_ptr)
        # what is small and this program's own, on its way while it waits
        entry = table_ptr + layer * FIELDS
        weights = _own_weights(entry, channels, state_channels, tile, outputs, SIZES)
        scales = _scales(entry, channels, lows, outputs, SIZES)
        window_ptr = conv_ptr + channels.index * CHANNEL_STRIDE
        recalled = _past(window_ptr, weights, channels.mask, SIZES)
        if SIZES.HAS_BIAS:
            x_bias, z_bias, out_bias = _biases(entry, channels, outputs, D)
            residual += out_bias
        _await(counter_ptr, target)

        hidden = _inputs(told.gained, SHARES, SIZES)
        squares = gl.load(told.squares + each, mask=each < PROGRAMS, other=0.0, cache_modifier=".cg")
        at = _multiply(ring, at, hidden, sums.x, 0, SIZES.X_STAGES, SHARES, SIZES)
        scale = 1.0 / gl.sqrt(gl.sum(squares, axis=0) / H + eps)
        x = _total(sums.x, BLOCK_C, SHARES, CHANNELS) * (scales.x * scale)
        if SIZES.HAS_BIAS:
            x += x_bias
        x = _convolve(x, window_ptr, recalled, channels.mask, SIZES)
        gl.store(told.x + channels.first + channels.index, x, mask=channels.mask)
        x_kept.store(x.to(gl.float32))
        target += PROGRAMS
        _count(counter_ptr)

        # what the recurrence needs and no other program writes
        constants = _constants_of_state(weights, state_channels, mask, dt_places, SIZES)
        h = gl.load(ssm_ptr + tile, mask=mask, other=0.0).to(gl.float32)
        gain = gl.load(weights.gain, mask=outputs.mask, other=0.0).to(gl.float32)
        at = _multiply(ring, at, hidden, sums.z, 0, SIZES.Z_STAGES, SHARES, SIZES)

        _await(counter_ptr, target)
        inner = _inputs(told.x, WIDE_SHARES, SIZES)
        at = _multiply(ring, at, inner, sums.low, 0, SIZES.P_STAGES, WIDE_SHARES, SIZES)
        low = _total(sums.low, BLOCK_P, WIDE_SHARES, OUTPUTS) * scales.low
        gl.store(told.low + lows.first + lows.index, low, mask=lows.index < lows.count)
        target += PROGRAMS
        _count(counter_ptr)

        at = _multiply(ring, at, hidden, sums.z, SIZES.Z_STAGES, SIZES.X_STAGES, SHARES, SIZES)
        z = _total(sums.z, BLOCK_C, SHARES, CHANNELS) * (scales.z * scale)
        if SIZES.HAS_BIAS:
            z += z_bias
        z = gl.convert_layout(z.to(gl.bfloat16).to(gl.float32), gl.SliceLayout(1, STATE))

        _await(counter_ptr, target)
        h, y = _advance_state(h, x_kept, z, told.low, constants, dt_places, inner_eps, SIZES)
        gl.store(told.y + state_channels.first + state_channels.index, y.to(gl.bfloat16), mask=state_channels.mask)
        target += PROGRAMS
        _count(counter_ptr)
        gl.store(ssm_ptr + tile, h.to(ssm_ptr.dtype.element_ty), mask=mask)
        _await(counter_ptr, target)

        inner = _inputs(told.y, WIDE_SHARES, SIZES)
        at = _multiply(ring, at, inner, sums.out, 0, SIZES.O_STAGES, WIDE_SHARES, SIZES)
        more = _total(sums.out, BLOCK_O, WIDE_SHARES, OUTPUTS) * scales.out
        residual += gl.where(outputs.mask, more, 0.0)
        _tell(residual, gain, told, outputs)
        conv_ptr += states.conv_layer_stride
        ssm_ptr += states.ssm_layer_stride

    _leave(counter_ptr, target, PROGRAMS)


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
    filled, freed = _barriers(STAGES, SIZES.COPIERS)
    ring = (tiles, filled, freed)
    sums = Products(
        gl.allocate_shared_memory(gl.float32, [BLOCK_C // ROWS, ROWS, 2], SHARED),
        gl.allocate_shared_memory(gl.float32, [BLOCK_C // ROWS, ROWS, 2], SHARED),
        gl.allocate_shared_memory(gl.float32, [BLOCK_P // WIDE_ROWS, WIDE_ROWS, 4], SHARED),
        gl.allocate_shared_memory(gl.float32, [BLOCK_O // WIDE_ROWS, WIDE_ROWS, 4], SHARED),
    )
    x_kept = gl.allocate_shared_memory(gl.float32, [BLOCK_C], SHARED_1D)
    begin = Begin(tokens_ptr, embeddings_ptr, gain_ptr)
    states = States(conv_ptr, ssm_ptr, conv_layer_stride, conv_stride, ssm_layer_stride, ssm_stride, slots_ptr)
    told = Told(x_ptr, low_ptr, y_ptr, gained_ptr, squares_ptr)
    gl.warp_specialize(
        [
            (
                _advance,
                (ring, sums, x_kept, table_ptr, begin, states, told, counter_ptr, layers, eps, inner_eps, SIZES),
            ),
            (_copy_weights, (ring, table_ptr, layers, SIZES)),
        ],
        [SIZES.COPIERS],
        [COPIER_REGISTERS],
    )
