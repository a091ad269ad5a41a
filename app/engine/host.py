"""From numbers on the host to a tensor on the device, in one copy."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor


def to_device(values: array[int] | array[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor; dtype is the array's own: "q" int64, "f" float32. On a CPU the memory is shared."""
    if not values:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.frombuffer(values, dtype=dtype).to(device, non_blocking=True)
