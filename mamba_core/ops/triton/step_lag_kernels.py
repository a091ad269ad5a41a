"""The recurrence of the token that a state lacks, done when the state is read next; see ``mamba_core.ops.lag``."""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops import lag
from mamba_core.ops.triton.math import LOG2_E, softplus
from mamba_core.ops.triton.persistent import DECAY, DT_BIAS, FIELDS

BEHIND = tl.constexpr(lag.BEHIND)
WRITTEN = tl.constexpr(lag.WRITTEN)


@triton.jit
def move(h, a, delta, x, b):
    """States h [BLOCK_D, BLOCK_N] one token on, by the same operations wherever it is done."""
    return tl.fma(tl.exp2(delta[:, None] * a), h, (delta * x)[:, None] * b[None, :])


@triton.jit
def is_left_behind(phase, slot):
    """Whether a step keeps the token of a slot in this phase and leaves its states as they are."""
    return (phase == WRITTEN) | ((phase == 0) & (slot % 2 == 0))


@triton.jit
def recall_token(inputs, b, phase, d, n, dim, N: tl.constexpr):
    """x, delta before its bias, and B of the token kept at ``inputs`` [2, D] and ``b`` [N], if there is one."""
    # the interpreter cannot mask by a scalar
    mask_d = d < tl.where(phase == BEHIND, dim, 0)
    mask_n = n < tl.where(phase == BEHIND, N, 0)
    x = tl.load(inputs + d, mask=mask_d, other=0.0)
    raw = tl.load(inputs + dim + d, mask=mask_d, other=0.0)
    return x, raw, tl.load(b + n, mask=mask_n, other=0.0)


@triton.jit
def keep_token(inputs, b, lags, x, raw, b_new, d, n, dim, N: tl.constexpr):
    """Keep the token of a slot that is left behind; each program its channels, the first one B."""
    mask_d = d < tl.where(lags, dim, 0)
    tl.store(inputs + d, x.to(inputs.dtype.element_ty), mask=mask_d)
    tl.store(inputs + dim + d, raw.to(inputs.dtype.element_ty), mask=mask_d)
    tl.store(b + n, b_new, mask=n < tl.where(lags & (tl.program_id(0) == 0), N, 0))


@triton.jit
def catch_up(h, a, bias, token, phase):
    """States h with the token that they lack, if there is one."""
    if phase == BEHIND:
        x, raw, b = token
        h = move(h, a, softplus(raw.to(tl.float32) + bias), x.to(tl.float32), b)
    return h


@triton.jit(do_not_specialize=["slots_ptr", "num_rows"])
def turn_kernel(phases_ptr, slots_ptr, num_rows, BLOCK_B: tl.constexpr):
    """The phases of these slots after a step."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = row < num_rows
    slot = tl.load(slots_ptr + row, mask=mask, other=0)
    phase = tl.load(phases_ptr + slot, mask=mask, other=0)
    # the rows of no sequence share a slot, whose states mean nothing
    tl.debug_barrier()
    tl.store(phases_ptr + slot, tl.where(is_left_behind(phase, slot), BEHIND, WRITTEN), mask=mask)


@triton.jit(do_not_specialize=["slots_ptr"])
def settle_kernel(
    table_ptr,
    bias_ptr,
    state_ptr,
    inputs_ptr,
    b_ptr,
    phases_ptr,
    slots_ptr,
    dim,
    state_layer,
    inputs_layer,
    b_layer,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D channels of one slot in one layer.

    table: of addresses, see ``persistent``; bias_ptr is one layer's bias of delta [D].
    """
    layer = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + tl.program_id(1))
    phase = tl.load(phases_ptr + slot)
    if phase == BEHIND:
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N)
        mask_d = d < dim
        mask = mask_d[:, None] & (n < N)[None, :]
        tile = d[:, None] * N + n[None, :]
        entry = table_ptr + layer * FIELDS
        a_ptr = tl.load(entry + DECAY).to(tl.pointer_type(tl.float32))
        own_bias_ptr = tl.load(entry + DT_BIAS).to(tl.pointer_type(bias_ptr.dtype.element_ty))
        a = tl.load(a_ptr + tile, mask=mask, other=0.0) * LOG2_E
        bias = tl.load(own_bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
        home = state_ptr + layer * state_layer + slot * dim * N + tile
        inputs = inputs_ptr + layer * inputs_layer + slot * 2 * dim
        token = recall_token(inputs, b_ptr + layer * b_layer + slot * N, phase, d, n, dim, N)
        h = catch_up(tl.load(home, mask=mask, other=0.0), a, bias, token, phase)
        tl.debug_barrier()
        tl.store(home, h, mask=mask)
