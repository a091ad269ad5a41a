"""The launch of ``advance_many_kernel``, and which layers it serves."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mamba_core.ops.lag import Lag
from mamba_core.ops.triton.devices import compiles_for_nvidia
from mamba_core.ops.triton.step_many_kernel import CHANNELS, STATES, advance_many_kernel

# programs of one warp that a multiprocessor has the registers for, at so many a thread
_PROGRAMS, REGISTERS = 20, 96
# rows whose slots one warp can hold
_MOST_ROWS = 32


def fits(A: Tensor, ssm_state: Tensor, inner_eps: float | None) -> bool:
    """Whether it serves for layers with A [D, N], states in ``ssm_state`` and a norm of B and C, or none."""
    dim, states = A.shape
    is_plain = inner_eps is None and ssm_state.dtype == torch.float32
    return is_plain and states == STATES.value and dim % CHANNELS.value == 0 and _can_run(A.device)


def _can_run(device: torch.device) -> bool:
    return compiles_for_nvidia(device) and torch.cuda.get_device_capability(device) >= (8, 0)


def advance_many(
    xz: Tensor,
    low: Tensor,
    delta: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    ssm_state: Tensor,
    slots: Tensor,
    lag: Lag | None,
    options: dict[str, bool],
) -> Tensor:
    """y [B, D] of xz [B, 2 D], low [B, R + 2 N] and delta [B, D] before its bias: see ``step.advance``.

    options: of the launch.
    """
    (rows, dim), width = delta.shape, low.shape[1]
    y = torch.empty_like(delta)
    own = rows_of_program(rows, dim, torch.cuda.get_device_properties(xz.device).multi_processor_count)
    advance_many_kernel[(dim // CHANNELS.value, triton.cdiv(rows, own))](
        xz,
        low,
        delta,
        dt_bias,
        A,
        D,
        y,
        ssm_state,
        slots,
        *((slots, y, y) if lag is None else (lag.phases, lag.inputs, lag.b)),
        rows,
        own,
        dim,
        ssm_state.stride(0),
        R=width - 2 * STATES.value,
        LAGS=lag is not None,
        num_warps=1,
        maxnreg=REGISTERS,
        **options,
    )
    return y


def rows_of_program(rows: int, dim: int, multiprocessors: int) -> int:
    """As few as let all programs be at work at once."""
    most = max(1, _PROGRAMS * multiprocessors // (dim // CHANNELS.value))
    return min(triton.cdiv(rows, most), _MOST_ROWS)
