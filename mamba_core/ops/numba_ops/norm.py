"""RMS norms: one task is a few tokens."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from mamba_core.ops.machine.compiling import compiled_callback, fingerprint
from mamba_core.ops.machine.lanes import fma, splat, total
from mamba_core.ops.numba_ops.sized import WIDTH, load, load_float, store
from mamba_core.ops.numba_ops.team import expect, flat, matrix, matrix_names, plain, record_of, run, take_tasks

# numbers of a task, for which a thread is worth its while
_NUMBERS_PER_TASK = 1 << 13

# an address of 0 stands for what is not there
_ARGUMENTS = record_of(
    (
        *("next_task", "num_tasks", "num_tokens", "tokens_per_task", "width", "eps", "weight"),
        *(name for matrix in ("x", "y", "residual", "sum") for name in matrix_names(matrix)),
    )
)
_NOTHING = (0, 0, 0)


@njit(error_model="numpy")
def _norm_token(a: Any, token: int) -> None:
    """The sum with the residual, kept as its dtype has it, and the norm of what was kept."""
    source, size = a.x + token * a.x_stride, a.x_size
    if a.residual != 0:
        kept, residual = a.sum + token * a.sum_stride, a.residual + token * a.residual_stride
        for first in range(0, a.width, WIDTH):
            count = a.width - first
            value = load(source + first * size, size, count)
            value = value + load(residual + first * a.residual_size, a.residual_size, count)
            store(kept + first * a.sum_size, value, a.sum_size, count)
        source, size = kept, a.sum_size
    squares = splat(np.float32(0.0))
    for first in range(0, a.width, WIDTH):
        value = load(source + first * size, size, a.width - first)
        squares = fma(value, value, squares)
    mean = total(squares) / np.float32(a.width)
    scale = splat(np.float32(1.0) / np.sqrt(mean + load_float(a.eps)))
    for first in range(0, a.width, WIDTH):
        count = a.width - first
        value = load(source + first * size, size, count) * scale
        if a.weight != 0:
            value = value * load(a.weight + 4 * first, 4, count)
        store(a.y + token * a.y_stride + first * a.y_size, value, a.y_size, count)


@njit(error_model="numpy")
def _norm_task(a: Any, task: int) -> None:
    for token in range(task * a.tokens_per_task, min((task + 1) * a.tokens_per_task, a.num_tokens)):
        _norm_token(a, token)


def _compile_tasks() -> Any:
    source = fingerprint()

    def norm_tasks(pointer: Any) -> int:
        take_tasks(pointer, _norm_task)
        return source

    return compiled_callback(types.int64(_ARGUMENTS), norm_tasks)


_norm_tasks = _compile_tasks()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ``mamba_core.ops.rms_norm``."""
    y = torch.empty(x.shape, dtype=x.dtype)
    _norm(x, None, None, y, weight, eps)
    return y


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``mamba_core.ops.rms_norm_residual``."""
    y, kept = torch.empty(x.shape, dtype=weight.dtype), torch.empty(x.shape, dtype=residual.dtype)
    _norm(x, residual, kept, y, weight, eps)
    return y, kept


def _norm(
    x: Tensor, residual: Tensor | None, kept: Tensor | None, y: Tensor, weight: Tensor | None, eps: float
) -> None:
    num_tokens, width = x.shape
    if residual is not None:
        expect(residual=(residual, x.shape))
    if weight is not None:
        expect(weight=(weight, (width,)))
    parts = [None if t is None else plain(t) for t in (x, y, residual, kept)]
    gain, epsilon = None if weight is None else flat(weight), array("f", [eps])
    tokens_per_task = max(1, _NUMBERS_PER_TASK // max(1, width))
    run(
        _norm_tasks,
        (
            *(num_tokens, tokens_per_task, width, epsilon.buffer_info()[0], 0 if gain is None else gain.data_ptr()),
            *(number for part in parts for number in (_NOTHING if part is None else matrix(part))),
        ),
        -(-num_tokens // tokens_per_task),
    )
