"""Scalar functions the kernels share, in fp32 and finite wherever their value is."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def softplus(v):
    # log1p by the quotient that cancels the rounding of 1 + e; above 20 this is v itself, as in torch
    e = tl.exp(-tl.abs(v))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(v, 0.0) + log1p
