"""From logits to a token: counter-based uniforms, filters as thresholds, and inversion of the distribution function.

Nothing here depends on the other rows of a batch, and no state is carried from draw to draw: the same key and
position give the same uniform number on every device. A filter keeps every token whose logit reaches a threshold, so
that ties at the threshold are kept together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# the additive constant and the finalizer of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
# number generators"; multipliers from variant 13 of Stafford's table)
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_MASK = 2**64 - 1

# fewer bits than a double holds, so that a uniform below 1 times a total stays below the total
_UNIFORM_BITS = 48

_BLOCK = 256

# how many times as many candidates are tried when there were too few
_WIDENING = 16


def stream_key(seed: int, sample: int) -> int:
    """The key of one sample's stream of uniforms, as a signed 64-bit integer."""
    return _signed(_mix(_mix(seed & _MASK) + (sample + 1) * _INCREMENT))


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) per row: keys, positions [B] int64 -> [B] float64. The same bits on every device."""
    x = keys + (positions + 1) * _signed(_INCREMENT)
    for shift, factor in _ROUNDS:
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    x = x ^ _shift_right(x, _LAST_SHIFT)
    return _shift_right(x, 64 - _UNIFORM_BITS).double() * 2.0**-_UNIFORM_BITS


def filter_thresholds(scaled: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, num_candidates: int) -> Tensor:
    """The least logit that top_k, then top_p, keep in each row.

    scaled [B, V]: logits over temperature, shifted to a maximum of 0; weights [B, V]: their exponentials; top_k [B]
    int64, 0 for off, never above ``num_candidates``; top_p [B], 1 for off. The likeliest ``num_candidates`` of each
    row are looked at first, more only where those do not hold enough weight. Returns [B], -inf for no filter.
    """
    while True:
        num_candidates = min(num_candidates, scaled.shape[1])
        thresholds, is_final = _thresholds_among(num_candidates, scaled, weights, top_k, top_p)
        if num_candidates == scaled.shape[1] or bool(is_final.all()):
            return thresholds
        num_candidates *= _WIDENING


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the running sum of weights first exceeds ``uniform`` of the total.

    weights [B, V], not negative and not all zero; uniform [B] float64 in [0, 1). Returns [B] int64, never a token of
    weight 0. Sums are double and taken by blocks, so that only one block per row is summed token by token.
    """
    num_rows, num_tokens = weights.shape
    blocks = F.pad(weights, (0, -num_tokens % _BLOCK)).view(num_rows, -1, _BLOCK)  # [B, V / block, block]
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)  # [B, 1]
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(-1)  # [B, block]
    offset = torch.searchsorted(inside, target - start, right=True)
    # rounding may leave the target at the block's own sum: its last token with weight is meant
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(offset, last)).squeeze(1).clamp_(max=num_tokens - 1)


def _thresholds_among(
    num_candidates: int, scaled: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor]:
    """``filter_thresholds`` from the likeliest candidates alone, and whether that is each row's final answer."""
    candidates = scaled.topk(num_candidates).values  # [B, C], falling
    kth = candidates.gather(1, (top_k - 1).clamp(min=0)[:, None])
    kth = torch.where(top_k[:, None] > 0, kth, -torch.inf)
    total = torch.where(scaled >= kth, weights, 0).sum(-1, keepdim=True, dtype=torch.float64)
    mass = torch.where(candidates >= kth, candidates.exp(), 0).double().cumsum(-1)
    num_below = (mass < top_p[:, None] * total).sum(-1, keepdim=True)
    nucleus = candidates.gather(1, num_below.clamp(max=num_candidates - 1))
    thresholds = torch.where(top_p[:, None] < 1, torch.maximum(kth, nucleus), kth)
    is_final = (num_below < num_candidates) | (top_k[:, None] > 0) | (top_p[:, None] >= 1)
    return thresholds.squeeze(1), is_final.squeeze(1)


def _mix(x: int) -> int:
    x &= _MASK
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift)) * factor & _MASK
    return x ^ (x >> _LAST_SHIFT)


def _signed(x: int) -> int:
    x &= _MASK
    return x - 2**64 if x >= 2**63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: the sign is a bit like any other."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
