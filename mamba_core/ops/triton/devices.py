"""What kernels can be compiled for."""

from __future__ import annotations

import torch
import triton


def compiles_for_nvidia(device: torch.device) -> bool:
    """Whether kernels are compiled for an NVIDIA GPU: those written for one alone cannot be interpreted."""
    return device.type == "cuda" and torch.version.hip is None and not triton.knobs.runtime.interpret
