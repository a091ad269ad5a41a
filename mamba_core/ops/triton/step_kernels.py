"""One token per row through a Mamba layer in few launches: what all its Triton kernels have in common.

A step streams all weights past the chip, so each kernel is written to keep memory busy: with PDL (programmatic
dependent launch, from compute capability 9.0) a kernel starts while its predecessor drains, and fetches before
``gdc_wait`` what does not depend on it: weights, and states, which the step before has left long ago. Loads whose
address must be loaded itself come last, or they would hold back the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Let the next kernel start, then wait for what the kernels before have written."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def await_inputs_first(PDL: tl.constexpr):
    """``await_inputs`` in the other order, as one kernel of a layer must: then what the others read before they wait,
    states and residuals, has been left by those that wrote it, however many kernels are at work at once.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_scales(scales_ptr, w_ptr, n, out_width):
    """What sums of the outputs n are to be multiplied with: [BLOCK_N, 1] for weights in int8, 1 for others."""
    if w_ptr.dtype.element_ty == tl.int8:
        return tl.load(scales_ptr + tl.minimum(n, out_width - 1))[:, None]
    else:  # noqa: RET505  what is not there must not be compiled
        return 1.0


@triton.jit
def recall(home, tap_stride, mask, K: tl.constexpr):
    """The K-1 inputs kept at ``home`` (see ``conv_kernels.at_home``), the oldest first."""
    columns = ()
    for j in tl.static_range(K - 1):
        columns += (tl.load(home + j * tap_stride, mask=mask, other=0.0),)
    return columns


@triton.jit
def weigh(columns, n, dim, taps_ptr, bias_ptr, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What ``recall``'s inputs add to the convolution of channels n [BLOCK_N], and the weights of what comes newest."""
    mask = n < dim
    past = tl.zeros_like(columns[0]).to(tl.float32)
    for j in tl.static_range(K - 1):
        past += columns[j].to(tl.float32) * tl.load(taps_ptr + n * K + j, mask=mask, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        past += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)[:, None]
    return past, tl.load(taps_ptr + n * K + K - 1, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def shift_state(home, tap_stride, columns, newest, mask, K: tl.constexpr):
    """Move the inputs at ``home`` on by one, once every thread of the program has read them.

    Several threads may hold the same element of a small tile, and one that is late must not read what has been moved.
    """
    tl.debug_barrier()
    for j in tl.static_range(1, K - 1):
        tl.store(home + (j - 1) * tap_stride, columns[j], mask=mask)
    tl.store(home + (K - 2) * tap_stride, newest, mask=mask)


@triton.jit(do_not_specialize=["eps"])
def embed_kernel(
    tokens_ptr,
    table_ptr,
    gain_ptr,
    residual_ptr,
    normed_ptr,
    width,
    eps,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row's embedding as residual [B, H] fp32, and its norm [B, H]."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < width
    gain = tl.load(gain_ptr + h, mask=mask, other=0.0).to(tl.float32)
    await_inputs(PDL)
    v = tl.load(table_ptr + tl.load(tokens_ptr + row) * width + h, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + row * width + h, v, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / width + eps)
    tl.store(normed_ptr + row * width + h, (v * scale * gain).to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def finish_kernel(
    values_ptr,
    squares_ptr,
    y_ptr,
    num_rows,
    width,
    eps,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """``gained`` of a row over its rms: y [B, H]."""
    row = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    p = tl.arange(0, BLOCK_P)
    mask = h < width
    await_inputs(PDL)
    squares = tl.sum(tl.load(squares_ptr + p * num_rows + row, mask=p < PARTS, other=0.0), axis=0)
    v = tl.load(values_ptr + row * width + h, mask=mask, other=0.0).to(tl.float32)
    y = v / tl.sqrt(squares / width + eps)
    tl.store(y_ptr + row * width + h, y.to(y_ptr.dtype.element_ty), mask=mask)
