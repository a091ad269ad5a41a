"""Selective scan, backward: one Triton kernel.

A program owns 32 channels (one warp, one channel per thread, see ``tiles``) and walks its sequences from the
last chunk to the first. In each chunk it recomputes the states from the checkpoint at the chunk's start into scratch
memory of its own, then follows the adjoint recurrence backwards:

    g_t = C_t ds_t + exp(delta_{t+1} A) g_{t+1}     ds = dy SiLU(z), g the gradient of the state after token t

Gradients of B and C are sums over all channels: each program writes its share, the host adds them up, so that the
result does not depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_core.ops.triton.math import LN_2, LOG2_E, sigmoid, softplus
from mamba_core.ops.triton.tiles import group_offset, load_states, store_states


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "nothing"])
def scan_backward_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    dy_ptr,
    checkpoint_ptr,
    scratch_ptr,
    cu_seqlens_ptr,
    dx_ptr,
    ddt_ptr,
    dz_ptr,
    db_ptr,
    dc_ptr,
    da_ptr,
    dd_ptr,
    dbias_ptr,
    x_stride,
    dt_stride,
    b_stride,
    c_stride,
    z_stride,
    dy_stride,
    num_tokens,
    num_rows,
    dim,
    nothing,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    CHECKPOINT: tl.constexpr,
):
    """dx, ddt, dz [T, D] contiguous; db, dc [channel blocks, T, N]; da [programs, D, N]; dd, dbias [programs, D];
    checkpoint as ``scan_kernel`` left it; scratch [programs, channel blocks, CHECKPOINT, BLOCK_N, BLOCK_D]."""
    program = tl.program_id(0)
    block = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, BLOCK_D)
    d = tl.program_id(1) * BLOCK_D + local
    n = tl.arange(0, BLOCK_N)
    mask_d = d < dim
    mask_n = n < N
    mask = mask_n[:, None] & mask_d[None, :]
    scratch = scratch_ptr + (program.to(tl.int64) * tl.num_programs(1) + block) * (CHECKPOINT * BLOCK_N * BLOCK_D)

    a = load_states(a_ptr, n, d, mask_d, N, BLOCK_N, BLOCK_D) * LOG2_E
    skip = tl.load(d_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    da = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dd = tl.zeros([BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_D], dtype=tl.float32)

    for row in range(program, num_rows, tl.num_programs(0)):
        begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
        length = (end - begin).to(tl.int32)
        num_chunks = (length + CHECKPOINT - 1) // CHECKPOINT
        kept = begin // CHECKPOINT + row
        g = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for back in range(0, num_chunks):
            chunk = num_chunks - 1 - back
            first = begin + chunk * CHECKPOINT
            size = tl.minimum(length - chunk * CHECKPOINT, CHECKPOINT)
            kept_ptr = checkpoint_ptr + (kept + chunk) * tl.cdiv(dim, 32) * (N * 32)
            kept_ptrs = kept_ptr + (group_offset(d, N) + nothing)[None, :] + (n * 32)[:, None]
            h = tl.load(kept_ptrs, mask=mask, other=0.0)
            for i in range(0, size):
                t = first + i
                state_ptr = scratch + i * (BLOCK_N * BLOCK_D)
                tl.store(state_ptr + (local + nothing)[None, :] + (n * BLOCK_D)[:, None], h)
                x = tl.load(x_ptr + t * x_stride + d, mask=mask_d, other=0.0).to(tl.float32)
                dt = tl.load(dt_ptr + t * dt_stride + d, mask=mask_d, other=0.0).to(tl.float32)
                b = tl.load(b_ptr + tl.multiple_of(t * b_stride, ALIGN) + n, mask=mask_n, other=0.0).to(tl.float32)
                delta = softplus(dt + bias)
                h = tl.exp2(delta[None, :] * a) * h + (delta * x)[None, :] * b[:, None]
            for j in range(0, size):
                i = size - 1 - j
                t = first + i
                state_ptr = scratch + i * (BLOCK_N * BLOCK_D)
                before = tl.load(state_ptr + (local + nothing)[None, :] + (n * BLOCK_D)[:, None])
                x = tl.load(x_ptr + t * x_stride + d, mask=mask_d, other=0.0).to(tl.float32)
                u = tl.load(dt_ptr + t * dt_stride + d, mask=mask_d, other=0.0).to(tl.float32) + bias
                z = tl.load(z_ptr + t * z_stride + d, mask=mask_d, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + t * dy_stride + d, mask=mask_d, other=0.0).to(tl.float32)
                b = tl.load(b_ptr + tl.multiple_of(t * b_stride, ALIGN) + n, mask=mask_n, other=0.0).to(tl.float32)
                c = tl.load(c_ptr + tl.multiple_of(t * c_stride, ALIGN) + n, mask=mask_n, other=0.0).to(tl.float32)
                delta = softplus(u)
                gain = delta * x
                decay = tl.exp2(delta[None, :] * a)
                remains = decay * before
                after = remains + gain[None, :] * b[:, None]
                s = tl.sum(after * c[:, None], axis=0) + skip * x
                gate = sigmoid(z)
                dz = dy * s * gate * (1.0 + z * (1.0 - gate))
                ds = dy * z * gate
                g += ds[None, :] * c[:, None]
                dc = tl.sum(after * ds[None, :], axis=1)
                db = tl.sum(g * gain[None, :], axis=1)
                along_b = tl.sum(g * b[:, None], axis=0)
                lost = g * remains
                da += lost * delta[None, :]
                ddelta = x * along_b + LN_2 * tl.sum(lost * a, axis=0)
                ddt = ddelta * sigmoid(u)
                dx = ds * skip + delta * along_b
                dd += ds * x
                dbias += ddt
                g *= decay
                out = t * dim + d
                tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask_d)
                tl.store(ddt_ptr + out, ddt.to(ddt_ptr.dtype.element_ty), mask=mask_d)
                tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=mask_d)
                share = (block * num_tokens + t) * N + n
                tl.store(db_ptr + share, db, mask=mask_n)
                tl.store(dc_ptr + share, dc, mask=mask_n)
    mine = program.to(tl.int64) * dim
    store_states(da_ptr + mine * N, da, n, d, mask_d, N)
    tl.store(dd_ptr + mine + d, dd, mask=mask_d)
    tl.store(dbias_ptr + mine + d, dbias, mask=mask_d)
