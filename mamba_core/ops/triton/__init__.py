"""The ops as Triton kernels: compiled on an NVIDIA GPU, interpreted on a CPU where ``TRITON_INTERPRET=1`` is set.

No kernel is specialised on what changes from call to call, the numbers of tokens and rows and the alignment of a list
of slots: a request must not wait for a compiler because it is the first of its length.
"""

from __future__ import annotations

from mamba_core.ops.triton.conv import causal_conv1d, causal_conv1d_step
from mamba_core.ops.triton.norm import rms_norm, rms_norm_residual
from mamba_core.ops.triton.scan import selective_scan, selective_scan_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "rms_norm",
    "rms_norm_residual",
    "selective_scan",
    "selective_scan_step",
]
