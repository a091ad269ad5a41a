"""Triton kernels that draw one token per row of logits; ``app.engine.fused_sampler`` launches them.

A row of V logits is cut into blocks of BLOCK. The first kernel reads every logit once and leaves per block the maximum
m, its index, and for rows drawn at random the sum of exp((x - m) / temperature). The second takes one row per program:
it joins the blocks, and a greedy row is done. A random row chooses a block by the blocks' sums and reads only that
block again. A filtered row first finds the least logit that is kept, by a search that streams the row.

Weights are fp32, sums of weights fp64. No result depends on how many rows there are.
"""

# mypy: ignore-errors
# Triton's language is not Python's type system

from __future__ import annotations

import triton
import triton.language as tl

# of a slot: key, position, temperature and top_p, log of min_p and top_k, token drawn last
ENTRY_WORDS = tl.constexpr(5)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# its place in ``order``
OF_LOWEST = tl.constexpr(-0x7F800000)

# beyond so many powers of two below the maximum, a weight is 0 in fp32
REACH = tl.constexpr(160.0)

# those of ``distribution.uniforms``
INCREMENT = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)

# how often the search divides its interval evenly in value, before it divides evenly in representable numbers
EVEN_STEPS = tl.constexpr(10)


@triton.jit
def uniform(key, position):
    """``distribution.uniforms`` of one int64 key and position, to the bit."""
    x = key.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * INCREMENT
    x = (x ^ (x >> 30)) * FIRST_FACTOR
    x = (x ^ (x >> 27)) * SECOND_FACTOR
    x = x ^ (x >> 31)
    return (x >> 16).to(tl.int64).to(tl.float64) * 3.552713678800501e-15


@triton.jit
def low_float(word):
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def order(x):
    """An int32 that is ordered as the fp32 is; ``from_order`` is its inverse."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order(bits):
    bits = bits.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rate_of(temperature):
    """log2(e) / temperature as the sum of two fp32, and the distance from the maximum at which weights end."""
    rate = LOG2_E / temperature.to(tl.float64)
    high = rate.to(tl.float32)
    rest = (rate - high.to(tl.float64)).to(tl.float32)
    return high, rest, tl.minimum(REACH / rate, -LOWEST).to(tl.float32)


@triton.jit
def weight_of(distance, rate, rest):
    """exp(-distance / temperature), to within the error of exp2; the power's rounding error is made good."""
    power = distance * rate
    error = tl.fma(distance, rate, -power) + distance * rest
    weight = tl.exp2(-power)
    return weight - weight * (error * LN_2)


@triton.jit
def bottom_of(limit, maximum, temperature):
    """The least x for which (maximum - x) / temperature, rounded twice as ``distribution`` rounds it, is within limit.

    So logits that tie after this rounding are kept together, and no other logit needs a division. Four times, 256
    numbers cut the interval in which x lies.
    """
    reach = rate_of(temperature)[2]
    low = tl.full([], OF_LOWEST, dtype=tl.int64)
    high = order(maximum).to(tl.int64)
    probes = tl.arange(0, 256).to(tl.int64)
    for _ in range(4):
        size = (high - low) // 256 + 1
        x = from_order(tl.minimum(low + probes * size, high))
        is_kept = tl.div_rn(tl.minimum(maximum - x, reach), temperature) <= limit
        first = tl.min(tl.where(is_kept, probes, 256), axis=0)
        high = tl.minimum(low + first * size, high)
        low = tl.where(first > 0, low + (first - 1) * size + 1, low)
    return from_order(high)


@triton.jit
def weights_from(x, mask, bottom, maximum, temperature):
    """fp64 weights of logits that are not below the bottom, 0 for the others."""
    rate, rest, reach = rate_of(temperature)
    weights = weight_of(tl.minimum(maximum - x, reach), rate, rest)
    return tl.where(mask & (x >= bottom), weights, 0.0).to(tl.float64)


@triton.jit
def load_logits(row_ptr, start, V: tl.constexpr, SIZE: tl.constexpr):
    """SIZE logits from ``start`` on in fp32, and which of them exist; the others are the lowest number."""
    token = start + tl.arange(0, SIZE)
    mask = token < V
    # the lowest fp32 would become infinite as a bf16
    return tl.where(mask, tl.load(row_ptr + token, mask=mask, other=0.0).to(tl.float32), LOWEST), mask


@triton.jit(do_not_specialize=["row_units"])
def sampler_block_kernel(
    logits_ptr,
    slots_ptr,
    table_ptr,
    maxima_ptr,
    indices_ptr,
    sums_ptr,
    row_units,
    V: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per block of a row: the maximum, infinite where any logit is not finite, its first index, and the sum of weights.

    maxima, indices, sums [B, blocks]; the row stride of the logits is ``row_units`` * ALIGN.
    """
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    out = row * tl.num_programs(0) + block
    word = tl.load(table_ptr + tl.load(slots_ptr + row) * ENTRY_WORDS + 2)
    x, mask = load_logits(logits_ptr + row * row_units * ALIGN, block * BLOCK, V, BLOCK)
    x = tl.where(tl.abs(x) <= -LOWEST, x, float("inf"))
    maximum = tl.max(x, axis=0)
    index = tl.min(tl.where(x == maximum, tl.arange(0, BLOCK), BLOCK), axis=0)
    tl.store(maxima_ptr + out, maximum)
    tl.store(indices_ptr + out, block * BLOCK + index)
    temperature = low_float(word)
    if temperature > 0:
        rate, rest, reach = rate_of(temperature)
        weights = tl.where(mask, weight_of(tl.minimum(maximum - x, reach), rate, rest), 0.0)
        tl.store(sums_ptr + out, tl.sum(weights.to(tl.float64), axis=0))


@triton.jit
def levels_between(low, high, maximum, temperature, step):
    """Three levels, not falling, that cut low < level < high into four parts; high - low is at least 2."""
    if step == 0:
        # a first look at where most thresholds lie
        first = order(tl.maximum(maximum - 18.0 * temperature, LOWEST)).to(tl.int64)
        second = order(tl.maximum(maximum - 6.0 * temperature, LOWEST)).to(tl.int64)
        third = order(tl.maximum(maximum - 2.0 * temperature, LOWEST)).to(tl.int64)
    elif step <= EVEN_STEPS:
        bottom = from_order(low)
        quarter = from_order(high - 1) * 0.25 - bottom * 0.25
        first = order(bottom + quarter).to(tl.int64)
        second = order(bottom + quarter * 2).to(tl.int64)
        third = order(bottom + quarter * 3).to(tl.int64)
    else:
        first = low + (high - low) // 4
        second = low + (high - low) // 2
        third = high - (high - low) // 4
    first = tl.minimum(tl.maximum(first, low + 1), high - 1)
    second = tl.minimum(tl.maximum(second, first), high - 1)
    third = tl.minimum(tl.maximum(third, second), high - 1)
    return first, second, third


@triton.jit
def pick(reaches_1, reaches_2, reaches_3, below, first, second, third):
    """The last of four rising numbers up to which the target is reached."""
    return tl.where(reaches_3, third, tl.where(reaches_2, second, tl.where(reaches_1, first, below)))


@triton.jit
def gather_between(row_ptr, scratch_ptr, low, high, V: tl.constexpr, CHUNK: tl.constexpr):
    """Write the logits x with low <= order(x) < high to the scratch memory, in the order of tokens."""
    bottom, top = from_order(low), from_order(high - 1)
    count = tl.zeros([], dtype=tl.int32)
    for start in range(0, V, CHUNK):
        x, mask = load_logits(row_ptr, start, V, CHUNK)
        is_between = mask & (x >= bottom) & (x <= top)
        ranks = tl.cumsum(is_between.to(tl.int32), axis=0)
        tl.store(scratch_ptr + count + ranks - 1, x, mask=is_between)
        count += tl.max(ranks, axis=0)
    # what one thread wrote, others read
    tl.debug_barrier()
    return count


@triton.jit
def threshold_of(
    row_ptr,
    scratch_ptr,
    maximum,
    lowest,
    num_above,
    target,
    temperature,
    IS_COUNT: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The greatest logit x for which the logits from x up number ``target``, or weigh as much; not below ``lowest``.

    The search keeps low <= order(x) < high and sums at three levels between the two at a time: over the row until at
    most CANDIDATES logits are left, then over these, which one tile holds. ``num_above`` is how many logits are not
    below ``lowest``, at most. Returns x, and how many logits are not below it, at most.
    """
    rate, rest, reach = rate_of(temperature)
    low = order(lowest).to(tl.int64)
    high = order(maximum).to(tl.int64) + 1
    # how many logits reach high, and how much they make up of the target
    num_done = tl.zeros([], dtype=tl.int32)
    done = tl.zeros([], dtype=tl.float64)
    step = 0
    while (low + 1 < high) & (num_above - num_done > CANDIDATES):
        first, second, third = levels_between(low, high, maximum, temperature, step)
        level_1, level_2, level_3 = from_order(first), from_order(second), from_order(third)
        counts_1 = tl.zeros([CHUNK], dtype=tl.int32)
        counts_2 = tl.zeros([CHUNK], dtype=tl.int32)
        counts_3 = tl.zeros([CHUNK], dtype=tl.int32)
        sums_1 = tl.zeros([CHUNK], dtype=tl.float32)
        sums_2 = tl.zeros([CHUNK], dtype=tl.float32)
        sums_3 = tl.zeros([CHUNK], dtype=tl.float32)
        for start in range(0, V, CHUNK):
            # those beyond the end are below every level
            x, _ = load_logits(row_ptr, start, V, CHUNK)
            counts_1 += (x >= level_1).to(tl.int32)
            counts_2 += (x >= level_2).to(tl.int32)
            counts_3 += (x >= level_3).to(tl.int32)
            if not IS_COUNT:
                weights = weight_of(tl.minimum(maximum - x, reach), rate, rest)
                sums_1 += tl.where(x >= level_1, weights, 0.0)
                sums_2 += tl.where(x >= level_2, weights, 0.0)
                sums_3 += tl.where(x >= level_3, weights, 0.0)
        count_1, count_2, count_3 = tl.sum(counts_1, axis=0), tl.sum(counts_2, axis=0), tl.sum(counts_3, axis=0)
        if IS_COUNT:
            sum_1, sum_2, sum_3 = count_1.to(tl.float64), count_2.to(tl.float64), count_3.to(tl.float64)
        else:
            sum_1 = tl.sum(sums_1.to(tl.float64), axis=0)
            sum_2 = tl.sum(sums_2.to(tl.float64), axis=0)
            sum_3 = tl.sum(sums_3.to(tl.float64), axis=0)
        reaches_1, reaches_2, reaches_3 = sum_1 >= target, sum_2 >= target, sum_3 >= target
        low = pick(reaches_1, reaches_2, reaches_3, low, first, second, third)
        high = pick(reaches_1, reaches_2, reaches_3, first, second, third, high)
        num_above = pick(reaches_1, reaches_2, reaches_3, num_above, count_1, count_2, count_3)
        num_done = pick(reaches_1, reaches_2, reaches_3, count_1, count_2, count_3, num_done)
        done = pick(reaches_1, reaches_2, reaches_3, sum_1, sum_2, sum_3, done)
        step += 1
    if low + 1 < high:
        count = gather_between(row_ptr, scratch_ptr, low, high, V, CHUNK)
        candidate = tl.arange(0, CANDIDATES)
        x = tl.load(scratch_ptr + candidate, mask=candidate < count, other=LOWEST)
        is_there = candidate < count
        if IS_COUNT:
            shares = is_there.to(tl.float32)
        else:
            shares = tl.where(is_there, weight_of(tl.minimum(maximum - x, reach), rate, rest), 0.0)
        while low + 1 < high:
            # draw both ends in to logits that exist, so that the search ends when one distinct logit is left
            is_between = is_there & (x >= from_order(low)) & (x <= from_order(high - 1))
            least = tl.min(tl.where(is_between, x, -LOWEST), axis=0)
            most = tl.max(tl.where(is_between, x, LOWEST), axis=0)
            if least < most:
                low = tl.maximum(low, order(least).to(tl.int64))
                high = tl.minimum(high, order(most).to(tl.int64) + 1)
                first, second, third = levels_between(low, high, maximum, temperature, step)
                sum_1 = tl.sum(tl.where(x >= from_order(first), shares, 0.0).to(tl.float64), axis=0)
                sum_2 = tl.sum(tl.where(x >= from_order(second), shares, 0.0).to(tl.float64), axis=0)
                sum_3 = tl.sum(tl.where(x >= from_order(third), shares, 0.0).to(tl.float64), axis=0)
                reaches_1, reaches_2, reaches_3 = done + sum_1 >= target, done + sum_2 >= target, done + sum_3 >= target
                low = pick(reaches_1, reaches_2, reaches_3, low, first, second, third)
                high = pick(reaches_1, reaches_2, reaches_3, first, second, third, high)
                step += 1
            else:
                # none is left where rounding or a target out of reach has led the search
                low = tl.where(least == most, order(most).to(tl.int64), low)
                high = low + 1
    return from_order(low), num_above


@triton.jit
def kept_sums(
    row_ptr,
    row_sums_ptr,
    maximum,
    bottom,
    temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Per block, the sum of the weights of logits that are not below the bottom."""
    # the sums there were have been read
    tl.debug_barrier()
    for first in range(0, NUM_BLOCKS, GROUP):
        block = first + tl.arange(0, GROUP)
        token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = token < V
        x = tl.load(row_ptr + token, mask=mask, other=LOWEST).to(tl.float32)
        weights = weights_from(x, mask, bottom, maximum, temperature)
        tl.store(row_sums_ptr + block, tl.sum(weights, axis=1), mask=block < NUM_BLOCKS)
    tl.debug_barrier()
    blocks = tl.arange(0, BLOCKS)
    return tl.load(row_sums_ptr + blocks, mask=blocks < NUM_BLOCKS, other=0.0)


@triton.jit
def first_above(weights, target, SIZE: tl.constexpr):
    """Where the running sum of fp64 weights first exceeds the target: never a weight of 0, -1 if all are 0.

    A parallel running sum may fall by a rounding error, so the weight itself is asked as well.
    """
    index = tl.arange(0, SIZE)
    has_weight = weights > 0
    first = tl.min(tl.where(has_weight & (tl.cumsum(weights, axis=0) > target), index, SIZE), axis=0)
    return tl.minimum(first, tl.max(tl.where(has_weight, index, -1), axis=0))


@triton.jit(do_not_specialize=["row_units", "num_tokens"])
def sampler_row_kernel(
    logits_ptr,
    slots_ptr,
    table_ptr,
    maxima_ptr,
    indices_ptr,
    sums_ptr,
    tokens_ptr,
    scratch_ptr,
    row_units,
    num_tokens,
    V: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUP: tl.constexpr,
    BROKEN: tl.constexpr,
):
    """One token per row from what ``sampler_block_kernel`` left, BROKEN where a logit is not finite; to the rows' slots
    it is the last one, and their positions advance by 1.

    ``num_tokens`` is V once more, unknown to the compiler.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_units * ALIGN
    entry_ptr = table_ptr + tl.load(slots_ptr + row) * ENTRY_WORDS
    position = tl.load(entry_ptr + 1)
    word = tl.load(entry_ptr + 2)
    temperature = low_float(word)
    blocks = tl.arange(0, BLOCKS)
    mask_blocks = blocks < NUM_BLOCKS
    maxima = tl.load(maxima_ptr + row * NUM_BLOCKS + blocks, mask=mask_blocks, other=LOWEST)
    indices = tl.load(indices_ptr + row * NUM_BLOCKS + blocks, mask=mask_blocks, other=0x7FFFFFFF)
    maximum = tl.max(maxima, axis=0)
    is_finite = maximum <= -LOWEST
    token = tl.min(tl.where(maxima == maximum, indices, 0x7FFFFFFF), axis=0)
    if (temperature > 0) & is_finite:
        rate, rest, reach = rate_of(temperature)
        limits = tl.load(entry_ptr + 3)
        top_p = low_float(word >> 32)
        top_k = (limits >> 32).to(tl.int32)
        limit = -low_float(limits)
        sums = tl.load(sums_ptr + row * NUM_BLOCKS + blocks, mask=mask_blocks, other=0.0)
        sums = sums * weight_of(tl.minimum(maximum - maxima, reach), rate, rest).to(tl.float64)
        bottom = tl.maximum(maximum - reach, LOWEST)
        is_limited = (top_k > 0) & (top_k < V)
        if is_limited | (top_p < 1) | (limit < REACH):
            lowest = bottom
            # not V itself: triton 3.6 fails to compile what is left when it knows that the search need not read rows
            num_above = num_tokens
            row_sums_ptr = sums_ptr + row * NUM_BLOCKS
            scratch_ptr += row * CANDIDATES
            if is_limited:
                target = top_k.to(tl.float64)
                lowest, num_above = threshold_of(
                    row_ptr, scratch_ptr, maximum, lowest, num_above, target, temperature, True, V, CHUNK, CANDIDATES
                )
                farthest = tl.div_rn(maximum - lowest, temperature)
                limit = tl.minimum(limit, farthest)
                if top_p < 1:
                    bottom = bottom_of(farthest, maximum, temperature)
                    sums = kept_sums(
                        row_ptr, row_sums_ptr, maximum, bottom, temperature, V, BLOCK, NUM_BLOCKS, BLOCKS, GROUP
                    )
            if top_p < 1:
                target = top_p.to(tl.float64) * tl.sum(sums, axis=0)
                lowest, num_above = threshold_of(
                    row_ptr, scratch_ptr, maximum, lowest, num_above, target, temperature, False, V, CHUNK, CANDIDATES
                )
                limit = tl.minimum(limit, tl.div_rn(maximum - lowest, temperature))
            bottom = bottom_of(limit, maximum, temperature)
            sums = kept_sums(row_ptr, row_sums_ptr, maximum, bottom, temperature, V, BLOCK, NUM_BLOCKS, BLOCKS, GROUP)
        target = uniform(tl.load(entry_ptr), position) * tl.sum(sums, axis=0)
        block = tl.maximum(first_above(sums, target, BLOCKS), 0)
        before = tl.sum(tl.where(blocks < block, sums, 0.0), axis=0)
        inside = tl.sum(tl.where(blocks == block, sums, 0.0), axis=0)
        x, mask = load_logits(row_ptr, block * BLOCK, V, BLOCK)
        weights = weights_from(x, mask, bottom, maximum, temperature)
        offset = first_above(weights, (target - before) / inside * tl.sum(weights, axis=0), BLOCK)
        token = tl.where(offset >= 0, block * BLOCK + offset, token)
    tl.store(tokens_ptr + row, tl.where(is_finite, token, BROKEN).to(tl.int64))
    # every warp has read the position before it changes
    tl.debug_barrier()
    tl.store(entry_ptr + 1, position + 1)
    tl.store(entry_ptr + 4, token.to(tl.int64))
