"""A decode step as one function that several threads run together, each with its share of every phase.

Products go by outputs, norms by rows, everything between in_proj and x_proj and between x_proj and out_proj by
channels. A share of channels is made, convolved and advanced by the same thread, so that only five times a layer all
wait for each other. Numbers come from a plan: int64 values, see ``Field`` and ``LayerField``.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import numpy as np

from mamba_core.ops.machine.compiling import compiled
from mamba_core.ops.machine.lanes import exp2, fma, silu, softplus, splat, total
from mamba_core.ops.machine.memory import bytes_of, load, load_scalar, store, store_scalar, word
from mamba_core.ops.native.columns import advance_16, load_columns, store_columns
from mamba_core.ops.native.products import multiply
from mamba_core.ops.native.quantized import product
from mamba_core.ops.native.threads import find_place, wait_for_all


class Field(IntEnum):
    """The head of a plan, behind the fields of any record: sizes, strides in bytes, addresses."""

    NUM_LAYERS = 35
    HIDDEN = 36
    CHANNELS = 37
    STATES = 38
    RANK = 39
    TAPS = 40
    EMBEDDINGS = 41
    RESIDUAL = 42
    RESIDUAL_STRIDE = 43
    # what out_proj made last
    OUTPUT = 44
    # inputs of in_proj, and of x_proj and out_proj, in the type that is multiplied
    NORMED = 45
    NORMED_STRIDE = 46
    CHOSEN = 47
    CHOSEN_STRIDE = 48
    # x and z, fp32
    XZ = 49
    XZ_STRIDE = 50
    # dt, B and C, fp32
    LOW = 51
    LOW_STRIDE = 52
    # inputs of dt_proj: every thread has its own
    RANKS = 53
    RANKS_STRIDE = 54
    RANKS_OF_THREAD = 55
    # softplus(dt), and that times x, fp32
    RATE = 56
    GAIN = 57
    RATE_STRIDE = 58
    FINAL_NORM = 59
    CONV_STATE = 60
    CONV_LAYER = 61
    SSM_STATE = 62
    SSM_LAYER = 63
    # what int8 is multiplied with: every thread has its own
    ROUNDED = 64
    ROUNDED_STRIDE = 65
    ROUNDED_OF_THREAD = 66
    TOKENS = 67
    SLOTS = 68
    NUM_ROWS = 69
    RESULTS = 70
    # fp32 in the lower half; the second is negative without norms of dt, B and C
    EPS = 71
    INNER_EPS = 72
    SIZE = 73


class HeadField(IntEnum):
    """The record of a product with the head: sizes, strides in bytes, addresses."""

    HIDDEN_STATES = 35
    INPUTS = 36
    INPUTS_STRIDE = 37
    NUM_ROWS = 38
    LENGTH = 39
    WEIGHTS = 40
    NUM_OUTPUTS = 41
    RESULTS = 42
    SCALES = 43
    ROUNDED = 44
    ROUNDED_STRIDE = 45
    ROUNDED_OF_THREAD = 46
    SIZE = 47


class LayerField(IntEnum):
    """What a plan holds of each layer: addresses, 0 for a bias that there is not."""

    NORM = 0
    IN_PROJ = 1
    IN_BIAS = 2
    CONV = 3
    CONV_BIAS = 4
    X_PROJ = 5
    DT_PROJ = 6
    DT_BIAS = 7
    # A times log2(e), fp32
    DECAY = 8
    SKIP = 9
    OUT_PROJ = 10
    OUT_BIAS = 11
    # of int8 weights, fp32
    IN_SCALES = 12
    X_SCALES = 13
    OUT_SCALES = 14
    SIZE = 15


@compiled
def share(length: int, thread: int, num_threads: int) -> tuple[int, int]:
    """The part of ``length`` outputs or channels that is a thread's: whole groups of 16."""
    groups = (length + 15) // 16
    return min(length, 16 * (groups * thread // num_threads)), min(length, 16 * (groups * (thread + 1) // num_threads))


@compiled
def take_embeddings(unit: Any, plan: int, tokens: int, first: int, end: int) -> None:
    hidden, stride = word(plan, Field.HIDDEN), word(plan, Field.RESIDUAL_STRIDE)
    for row in range(first, end):
        source = word(plan, Field.EMBEDDINGS) + word(tokens, row) * hidden * bytes_of(unit)
        target, output = word(plan, Field.RESIDUAL) + row * stride, word(plan, Field.OUTPUT) + row * stride
        for i in range(0, hidden, 16):
            left = hidden - i
            store(np.float32(0), target + 4 * i, load(unit, source + i * bytes_of(unit), left), left)
            store(np.float32(0), output + 4 * i, splat(np.float32(0)), left)


@compiled
def normalize(
    unit: Any, result_unit: Any, plan: int, bias: int, gain: int, eps: float, results: int, stride: int, row: int
) -> None:
    """Add what a layer made to a row of the residual, and write the norm of the sum."""
    hidden = word(plan, Field.HIDDEN)
    offset = row * word(plan, Field.RESIDUAL_STRIDE)
    residual, output, result = (
        word(plan, Field.RESIDUAL) + offset,
        word(plan, Field.OUTPUT) + offset,
        results + row * stride,
    )
    squares = splat(np.float32(0))
    for i in range(0, hidden, 16):
        left = hidden - i
        value = load(np.float32(0), residual + 4 * i, left) + load(np.float32(0), output + 4 * i, left)
        if bias != 0:
            value = value + load(unit, bias + i * bytes_of(unit), left)
        store(np.float32(0), residual + 4 * i, value, left)
        squares = fma(value, value, squares)
    scale = splat(np.float32(1 / math.sqrt(total(squares) / np.float32(hidden) + eps)))
    for i in range(0, hidden, 16):
        left = hidden - i
        value = load(np.float32(0), residual + 4 * i, left) * scale
        value = value * load(unit, gain + i * bytes_of(unit), left)
        store(result_unit, result + i * bytes_of(result_unit), value, left)


@compiled
def convolve(
    unit: Any, input_unit: Any, plan: int, layer: int, state: int, slots: int, num_rows: int, first: int, end: int
) -> None:
    """Bias, convolution and SiLU of a share of channels of x, which stays in its place; its copy is x_proj's input."""
    taps, channels = word(plan, Field.TAPS), word(plan, Field.CHANNELS)
    in_bias, bias = word(layer, LayerField.IN_BIAS), word(layer, LayerField.CONV_BIAS)
    size = bytes_of(unit)
    for d in range(first, end, 16):
        left = end - d
        weights = word(layer, LayerField.CONV) + d * taps * size
        for row in range(num_rows):
            x = word(plan, Field.XZ) + row * word(plan, Field.XZ_STRIDE) + 4 * d
            past = state + (word(slots, row) * channels + d) * (taps - 1) * size
            if in_bias != 0:
                store(np.float32(0), x, load(np.float32(0), x, left) + load(unit, in_bias + d * size, left), left)
            if taps == 4 and left >= 16:
                value = weigh_4(unit, x, past, weights)
            else:
                for i in range(min(left, 16)):
                    weigh_one(unit, x + 4 * i, past + i * (taps - 1) * size, weights + i * taps * size, taps)
                value = load(np.float32(0), x, left)
            if bias != 0:
                value = value + load(unit, bias + d * size, left)
            value = silu(value)
            store(np.float32(0), x, value, left)
            chosen = word(plan, Field.CHOSEN) + row * word(plan, Field.CHOSEN_STRIDE)
            store(input_unit, chosen + d * bytes_of(input_unit), value, left)


@compiled
def weigh_4(unit: Any, x: int, past: int, weights: int) -> Any:
    """The convolution of four taps of 16 channels, whose past takes their input in."""
    w0, w1, w2, w3 = load_columns(unit, weights, 4)
    x0, x1, x2 = load_columns(unit, past, 3)
    x3 = load(np.float32(0), x, 16)
    store_columns(unit, past, (x1, x2, x3))
    return fma(x3, w3, fma(x2, w2, fma(x1, w1, x0 * w0)))


@compiled
def weigh_one(unit: Any, x: int, past: int, weights: int, taps: int) -> None:
    """The convolution of one channel, in place of its input, which the past takes in."""
    size = bytes_of(unit)
    value = load_scalar(np.float32(0), x)
    result = value * load_scalar(unit, weights + (taps - 1) * size)
    for k in range(taps - 1):
        old = load_scalar(unit, past + k * size)
        result += old * load_scalar(unit, weights + k * size)
        if k > 0:
            store_scalar(unit, past + (k - 1) * size, old)
    store_scalar(unit, past + (taps - 2) * size, value)
    store_scalar(np.float32(0), x, result)


@compiled
def take_ranks(input_unit: Any, plan: int, num_rows: int, thread: int) -> int:
    """Copy dt of all rows to where this thread's dt_proj finds it; returns its address."""
    rank, stride = word(plan, Field.RANK), word(plan, Field.RANKS_STRIDE)
    ranks = word(plan, Field.RANKS) + thread * word(plan, Field.RANKS_OF_THREAD)
    for row in range(num_rows):
        low = word(plan, Field.LOW) + row * word(plan, Field.LOW_STRIDE)
        for i in range(0, rank, 16):
            value = load(np.float32(0), low + 4 * i, rank - i)
            store(input_unit, ranks + row * stride + i * bytes_of(input_unit), value, rank - i)
    return ranks


@compiled
def normalize_part(values: int, length: int, eps: float) -> None:
    """The norm without a weight of fp32 values, in place."""
    squares = splat(np.float32(0))
    for i in range(0, length, 16):
        value = load(np.float32(0), values + 4 * i, length - i)
        squares = fma(value, value, squares)
    scale = splat(np.float32(1 / math.sqrt(total(squares) / np.float32(length) + eps)))
    for i in range(0, length, 16):
        value = load(np.float32(0), values + 4 * i, length - i) * scale
        store(np.float32(0), values + 4 * i, value, length - i)


@compiled
def find_rates(unit: Any, plan: int, layer: int, num_rows: int, first: int, end: int) -> None:
    """softplus(dt + bias) and its product with x, for a share of channels."""
    bias, size, stride = word(layer, LayerField.DT_BIAS), bytes_of(unit), word(plan, Field.RATE_STRIDE)
    for row in range(num_rows):
        x = word(plan, Field.XZ) + row * word(plan, Field.XZ_STRIDE)
        rates, gains = word(plan, Field.RATE) + row * stride, word(plan, Field.GAIN) + row * stride
        for d in range(first, end, 16):
            left = end - d
            dt = load(np.float32(0), rates + 4 * d, left)
            if bias != 0:
                dt = dt + load(unit, bias + d * size, left)
            rate = softplus(dt)
            store(np.float32(0), rates + 4 * d, rate, left)
            store(np.float32(0), gains + 4 * d, rate * load(np.float32(0), x + 4 * d, left), left)


@compiled
def advance_channel(state: int, decay: int, states: int, rate: float, gain: float, b: int, c: int) -> float:
    """One step of one channel's states in place; returns the sum of C * h."""
    result = splat(np.float32(0))
    for n in range(0, states, 16):
        left = states - n
        e = exp2(splat(rate) * load(np.float32(0), decay + 4 * n, left))
        added = splat(gain) * load(np.float32(0), b + 4 * n, left)
        h = fma(e, load(np.float32(0), state + 4 * n, left), added)
        store(np.float32(0), state + 4 * n, h, left)
        result = fma(h, load(np.float32(0), c + 4 * n, left), result)
    return total(result)


@compiled
def advance(
    unit: Any, input_unit: Any, plan: int, layer: int, state: int, slots: int, num_rows: int, first: int, end: int
) -> None:
    """One step of a share of channels: states, skip and gate; the result is out_proj's input."""
    channels, states, rank = word(plan, Field.CHANNELS), word(plan, Field.STATES), word(plan, Field.RANK)
    decay, skip = word(layer, LayerField.DECAY), word(layer, LayerField.SKIP)
    in_bias, size, stride = word(layer, LayerField.IN_BIAS), bytes_of(unit), word(plan, Field.RATE_STRIDE)
    for begin in range(first, end, 64):
        for row in range(num_rows):
            x = word(plan, Field.XZ) + row * word(plan, Field.XZ_STRIDE)
            rates, gains = word(plan, Field.RATE) + row * stride, word(plan, Field.GAIN) + row * stride
            b = word(plan, Field.LOW) + row * word(plan, Field.LOW_STRIDE) + 4 * rank
            c = b + 4 * states
            own = state + word(slots, row) * channels * states * 4
            chosen = word(plan, Field.CHOSEN) + row * word(plan, Field.CHOSEN_STRIDE)
            for d in range(begin, min(begin + 64, end), 16):
                left = end - d
                h, a = own + d * states * 4, decay + d * states * 4
                if states == 16 and left >= 16:
                    y = advance_16(
                        h, a, rates + 4 * d, gains + 4 * d, load(np.float32(0), b, 16), load(np.float32(0), c, 16)
                    )
                else:
                    for i in range(min(left, 16)):
                        at, offset = 4 * (d + i), i * states * 4
                        rate = load_scalar(np.float32(0), rates + at)
                        gain = load_scalar(np.float32(0), gains + at)
                        store_scalar(
                            np.float32(0), rates + at, advance_channel(h + offset, a + offset, states, rate, gain, b, c)
                        )
                    y = load(np.float32(0), rates + 4 * d, left)
                y = fma(load(np.float32(0), skip + 4 * d, left), load(np.float32(0), x + 4 * d, left), y)
                z = load(np.float32(0), x + 4 * (channels + d), left)
                if in_bias != 0:
                    z = z + load(unit, in_bias + (channels + d) * size, left)
                store(input_unit, chosen + d * bytes_of(input_unit), y * silu(z), left)


@compiled
def run_step(unit: Any, input_unit: Any, weight_unit: Any, staged_unit: Any, plan: int) -> None:
    """One step of all layers, from tokens to what comes out of the final norm, in the type of ``unit``.

    unit, input_unit: of dt_proj and of vectors, and of what dt_proj is multiplied with. weight_unit, staged_unit: of
    the large matrices, and of what they are multiplied with as it lies in memory.
    """
    thread, num_threads = find_place(plan)
    slots, num_rows = word(plan, Field.SLOTS), word(plan, Field.NUM_ROWS)
    eps = load_scalar(np.float32(0), plan + 8 * Field.EPS)
    inner_eps = load_scalar(np.float32(0), plan + 8 * Field.INNER_EPS)
    hidden, channels = word(plan, Field.HIDDEN), word(plan, Field.CHANNELS)
    states, rank = word(plan, Field.STATES), word(plan, Field.RANK)
    first, end = share(channels, thread, num_threads)
    first_low, end_low = share(rank + 2 * states, thread, num_threads)
    first_out, end_out = share(hidden, thread, num_threads)
    first_row, end_row = num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads
    normed, normed_stride = word(plan, Field.NORMED), word(plan, Field.NORMED_STRIDE)
    chosen, chosen_stride = word(plan, Field.CHOSEN), word(plan, Field.CHOSEN_STRIDE)
    xz, xz_stride = word(plan, Field.XZ), word(plan, Field.XZ_STRIDE)
    low, low_stride = word(plan, Field.LOW), word(plan, Field.LOW_STRIDE)
    take_embeddings(unit, plan, word(plan, Field.TOKENS), first_row, end_row)
    bias = 0
    room, room_stride = (
        word(plan, Field.ROUNDED) + thread * word(plan, Field.ROUNDED_OF_THREAD),
        word(plan, Field.ROUNDED_STRIDE),
    )
    for index in range(word(plan, Field.NUM_LAYERS)):
        layer = plan + 8 * (Field.SIZE + index * LayerField.SIZE)
        for row in range(first_row, end_row):
            normalize(unit, staged_unit, plan, bias, word(layer, LayerField.NORM), eps, normed, normed_stride, row)
        wait_for_all(plan, num_threads)
        w = word(layer, LayerField.IN_PROJ)
        scales = word(layer, LayerField.IN_SCALES)
        for half in (0, channels):
            product(
                weight_unit,
                normed,
                normed_stride,
                num_rows,
                w,
                scales,
                hidden,
                xz,
                xz_stride,
                half + first,
                half + end,
                room,
                room_stride,
            )
        state = word(plan, Field.CONV_STATE) + index * word(plan, Field.CONV_LAYER)
        convolve(unit, staged_unit, plan, layer, state, slots, num_rows, first, end)
        wait_for_all(plan, num_threads)
        w = word(layer, LayerField.X_PROJ)
        scales = word(layer, LayerField.X_SCALES)
        product(
            weight_unit,
            chosen,
            chosen_stride,
            num_rows,
            w,
            scales,
            channels,
            low,
            low_stride,
            first_low,
            end_low,
            room,
            room_stride,
        )
        wait_for_all(plan, num_threads)
        if inner_eps >= 0:
            for row in range(first_row, end_row):
                normalize_part(low + row * low_stride, rank, inner_eps)
                normalize_part(low + row * low_stride + 4 * rank, states, inner_eps)
                normalize_part(low + row * low_stride + 4 * (rank + states), states, inner_eps)
            wait_for_all(plan, num_threads)
        ranks = take_ranks(input_unit, plan, num_rows, thread)
        w = word(layer, LayerField.DT_PROJ)
        rates, stride = word(plan, Field.RATE), word(plan, Field.RATE_STRIDE)
        multiply(unit, ranks, word(plan, Field.RANKS_STRIDE), num_rows, w, rank, rates, stride, first, end)
        find_rates(unit, plan, layer, num_rows, first, end)
        state = word(plan, Field.SSM_STATE) + index * word(plan, Field.SSM_LAYER)
        advance(unit, staged_unit, plan, layer, state, slots, num_rows, first, end)
        wait_for_all(plan, num_threads)
        w, scales = word(layer, LayerField.OUT_PROJ), word(layer, LayerField.OUT_SCALES)
        product(
            weight_unit,
            chosen,
            chosen_stride,
            num_rows,
            w,
            scales,
            channels,
            word(plan, Field.OUTPUT),
            word(plan, Field.RESIDUAL_STRIDE),
            first_out,
            end_out,
            room,
            room_stride,
        )
        bias = word(layer, LayerField.OUT_BIAS)
        wait_for_all(plan, num_threads)
    results, gain = word(plan, Field.RESULTS), word(plan, Field.FINAL_NORM)
    for row in range(first_row, end_row):
        normalize(unit, unit, plan, bias, gain, eps, results, hidden * bytes_of(unit), row)


@compiled
def run_head(unit: Any, weight_unit: Any, staged_unit: Any, record: int) -> None:
    """results [B, V] fp32 of hidden states [B, H] in the weights' type; see ``HeadField``."""
    thread, num_threads = find_place(record)
    num_rows, length = word(record, HeadField.NUM_ROWS), word(record, HeadField.LENGTH)
    inputs, stride = word(record, HeadField.INPUTS), word(record, HeadField.INPUTS_STRIDE)
    for row in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
        hidden = word(record, HeadField.HIDDEN_STATES) + row * length * bytes_of(unit)
        for i in range(0, length, 16):
            value = load(unit, hidden + i * bytes_of(unit), length - i)
            store(staged_unit, inputs + row * stride + i * bytes_of(staged_unit), value, length - i)
    wait_for_all(record, num_threads)
    num_outputs, results = word(record, HeadField.NUM_OUTPUTS), word(record, HeadField.RESULTS)
    first, end = share(num_outputs, thread, num_threads)
    weights, scales = word(record, HeadField.WEIGHTS), word(record, HeadField.SCALES)
    room = word(record, HeadField.ROUNDED) + thread * word(record, HeadField.ROUNDED_OF_THREAD)
    room_stride, result_stride = word(record, HeadField.ROUNDED_STRIDE), 4 * num_outputs
    product(
        weight_unit,
        inputs,
        stride,
        num_rows,
        weights,
        scales,
        length,
        results,
        result_stride,
        first,
        end,
        room,
        room_stride,
    )
