"""The ops on a CPU without gradients, as machine code that numba makes at their first import.

Outputs are fp32 or bf16; other dtypes are left to ``mamba_core.ops.cpu``.
"""

from mamba_core.ops.numba_ops.conv import causal_conv1d, causal_conv1d_step
from mamba_core.ops.numba_ops.norm import rms_norm, rms_norm_residual
from mamba_core.ops.numba_ops.scan import selective_scan, selective_scan_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "rms_norm",
    "rms_norm_residual",
    "selective_scan",
    "selective_scan_step",
]
