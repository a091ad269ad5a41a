"""State tiles [BLOCK_N, BLOCK_D] that lie one channel per thread, all N states of it in that thread's registers.

In this layout the recurrence and the sums over states need no exchange between threads. It is the compiler's default
for such a tile when BLOCK_D = 32 * num_warps, and it stays so as long as no wide access to memory asks for another one.
So memory ordered [D, N] is read and written state by state, as vectors over channels. Our own buffers are ordered
[channel groups, N, 32], which makes the states of a channel lie at constant distances, and their offsets carry a zero
that the compiler does not know to be one, ``nothing``, which keeps it from vectorising them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_states(ptr, n, d, mask_d, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile at ``ptr`` [D, N], in fp32, zero where masked."""
    tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for k in tl.static_range(N):
        column = tl.load(ptr + d * N + k, mask=mask_d, other=0.0).to(tl.float32)
        tile = tl.where((n == k)[:, None], column[None, :], tile)
    return tile


@triton.jit
def store_states(ptr, tile, n, d, mask_d, N: tl.constexpr):
    """Write the tile to ``ptr`` [D, N] in the pointer's dtype."""
    for k in tl.static_range(N):
        column = tl.sum(tl.where((n == k)[:, None], tile, 0.0), axis=0)
        tl.store(ptr + d * N + k, column.to(ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def group_offset(d, N: tl.constexpr):
    """Where channel d's first state lies in memory ordered [channel groups, N, 32]; the others follow, 32 apart."""
    return (d // 32) * (N * 32) + d % 32
