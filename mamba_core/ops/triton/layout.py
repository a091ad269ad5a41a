"""What the kernels require of their tensors' memory."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x`` with contiguous channels: itself if only its rows are strided, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_state(state: Tensor) -> None:
    """Slots may lie anywhere, but each must be one contiguous block, since it is written in place."""
    if state.stride(2) != 1 or state.stride(1) != state.shape[2]:
        raise ValueError(f"each slot of the state must be contiguous, got strides {state.stride()}")


def is_tap_major(state: Tensor) -> bool:
    """Whether all channels of one tap lie together in a convolution's state [..., D, K-1], else all taps of a channel.

    Slots may lie anywhere, but each must be one contiguous block of either kind, since it is written in place.
    """
    dim, taps = state.shape[-2:]
    strides = state.stride()[-2:]
    if strides not in ((taps, 1), (1, dim)):
        raise ValueError(f"each slot of the state must be contiguous, by channels or by taps, got strides {strides}")
    return strides == (1, dim)
