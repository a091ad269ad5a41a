"""The language modeling loss, also for batches whose logits would not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100
_LOGITS_AT_ONCE = 2**25


def next_tokens(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """What each position of ``labels`` [B, L] has to predict: [B, L], -100 at the end and at padded positions."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    if attention_mask is None:
        return targets
    real = attention_mask[:, -targets.shape[1] :].to(targets.device)
    return targets.masked_fill(real == 0, IGNORED_LABEL)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of logits [..., V] and targets [...]; -100 counts for nothing."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def cross_entropy_in_pieces(
    hidden: Tensor, targets: Tensor, compute_logits: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """``cross_entropy`` of ``compute_logits(hidden)`` for hidden [..., H], a few thousand tokens at a time.

    The logits of a piece are dropped after use and computed again for the gradient.
    """
    size = max(1, _LOGITS_AT_ONCE // vocab_size)

    def of_piece(piece: Tensor, piece_targets: Tensor) -> Tensor:
        return cross_entropy(compute_logits(piece), piece_targets)

    total = hidden.new_zeros((), dtype=torch.float32)
    pieces = zip(torch.split(hidden.flatten(0, -2), size), torch.split(targets.flatten(), size), strict=True)
    for piece, piece_targets in pieces:
        total = total + checkpoint(of_piece, piece, piece_targets, use_reentrant=False, preserve_rng_state=False)
    return total
