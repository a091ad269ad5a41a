"""What makes int8 matrices those of a type that the library multiplies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(w_ptr, scales_ptr, y_ptr, in_width, BLOCK: tl.constexpr):
    """BLOCK inputs of an output: y [out, in] = w times the output's scale."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < in_width
    w = tl.load(w_ptr + row * in_width + k, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
    y = w * tl.load(scales_ptr + row)
    tl.store(y_ptr + row * in_width + k, y.to(y_ptr.dtype.element_ty), mask=mask)
