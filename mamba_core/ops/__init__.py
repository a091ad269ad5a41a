"""The operations of a Mamba layer: one public function per op, chosen by the tensors' device.

Letters in names, shapes and comments, here and everywhere:

    T  packed tokens of one call, all sequences end to end     D  inner channels, intermediate_size
    B  rows (sequences) in one call                            N  SSM state size per channel, state_size
    L  tokens of one sequence                                  K  convolution width, conv_kernel
    S  state slots in the pool                                 R  dt_rank (also time_step_rank)
    H  hidden_size                                             V  vocabulary size

Every tensor is token-major: channels are contiguous, rows may be strided (a slice of a projection's output is
passed as it is). Scan and convolution always start from ``state[slots]`` and leave the new state there; a fresh
sequence is one whose slot was zeroed. Slots within one call are distinct, except for slot 0 of a serving pool, the
scratch slot of padding rows, whose content is never meaningful.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mamba_core.ops.packing import Packing

__all__ = [
    "Packing",
    "causal_conv1d",
    "causal_conv1d_step",
    "rms_norm",
    "rms_norm_residual",
    "selective_scan",
    "selective_scan_step",
]


def _backend(x: Tensor, *others: Tensor | None) -> ModuleType:
    """Where the kernels are for tensors on the device of x; ``others`` are what else may want a gradient."""
    if x.device.type == "cuda":
        from mamba_core.ops import triton

        return triton
    if has_machine_code(x) and not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))
    ):
        from mamba_core.ops import numba_ops

        return numba_ops
    from mamba_core.ops import cpu

    return cpu


def has_machine_code(x: Tensor) -> bool:
    """Whether numba makes code for such tensors; it is not everywhere where torch is."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and _has_numba()
    )


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, packing: Packing) -> Tensor:
    """Depthwise causal convolution with SiLU over packed sequences, continuing from ``state``.

    x [T, D]; weight [D, K]; bias [D] or None; state [S, D, K-1], the last K-1 inputs of each slot, oldest first,
    updated in place. Returns [T, D] in x's dtype. Differentiable in x, weight and bias; no gradient flows through
    the state.
    """
    y: Tensor = _backend(x, weight, bias).causal_conv1d(x, weight, bias, state, packing)
    return y


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor) -> Tensor:
    """``causal_conv1d`` of one token per row: x [B, D], slots [B] int64. Not differentiable."""
    y: Tensor = _backend(x, weight, bias).causal_conv1d_step(x, weight, bias, state, slots)
    return y


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    packing: Packing,
) -> Tensor:
    """Selective scan (Gu & Dao 2023, algorithm 2) over packed sequences, continuing from ``state``.

    With delta = softplus(dt + dt_bias), per channel d and token t:
    h = exp(delta * A) * h + delta * B * x;  y = (sum_n C * h + D * x) * SiLU(z).

    x, dt, z [T, D]; A [D, N] fp32, negative; B, C [T, N]; D, dt_bias [D]; state [S, D, N] updated in place.
    Arithmetic is fp32. Returns y [T, D] in x's dtype. Differentiable in everything but the state.
    """
    y: Tensor = _backend(x, dt, A, B, C, D, z, dt_bias).selective_scan(x, dt, A, B, C, D, z, dt_bias, state, packing)
    return y


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """``selective_scan`` of one token per row: x, dt, z [B, D]; B, C [B, N]; slots [B] int64. Not differentiable."""
    y: Tensor = _backend(x, dt, A, B, C, D, z, dt_bias).selective_scan_step(x, dt, A, B, C, D, z, dt_bias, state, slots)
    return y


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in fp32; x [T, H], weight [H] or None. Returns x's dtype."""
    y: Tensor = _backend(x, weight).rms_norm(x, weight, eps)
    return y


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x`` and its norm: x [T, H], residual [T, H] (its dtype is kept, fp32 or x's), weight [H].

    Returns (norm in the weight's dtype [T, H], new residual [T, H]).
    """
    norm: Tensor
    total: Tensor
    norm, total = _backend(x, residual, weight).rms_norm_residual(x, residual, weight, eps)
    return norm, total
