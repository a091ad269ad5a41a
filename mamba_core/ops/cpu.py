"""The ops on a CPU: few large torch operations per chunk of tokens, one fused operation per token of the recurrence.

Sequences of one call advance together, longest first, so that B rows of equal length cost one loop over L tokens.
Every function is differentiable; without gradients, buffers are reused and memory does not grow with L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.ops.packing import Packing

# state elements of one loop step and of one chunk: sized so that a chunk stays in the cores' caches
_ELEMENTS_PER_TOKEN = 1 << 17
_ELEMENTS_PER_CHUNK = 1 << 20
# inputs of one chunk of a convolution
_CONV_ELEMENTS = 1 << 17


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, packing: Packing) -> Tensor:
    """See ``mamba_core.ops.causal_conv1d``."""
    if packing.num_tokens == 0:
        return torch.empty_like(x)
    history = state[packing.slots]  # [B, D, K-1], a copy
    chunk = max(1, _CONV_ELEMENTS // x.shape[1])
    begins = range(0, packing.num_tokens, chunk)
    if _wants_grad(x, weight, bias):
        y = torch.cat([_conv_tokens(x, weight, bias, history, packing, t, t + chunk) for t in begins])
    else:
        y = torch.empty(x.shape, dtype=x.dtype)
        for t in begins:
            y[t : t + chunk] = _conv_tokens(x, weight, bias, history, packing, t, t + chunk)
    state[packing.slots] = _conv_tail(x.detach(), history, packing)
    return y


def _conv_tokens(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, packing: Packing, begin: int, end: int
) -> Tensor:
    """Outputs of tokens begin to end [end - begin, D]."""
    end = min(end, packing.num_tokens)
    before = weight.shape[1] - 1
    low = max(0, begin - before)
    taps = weight.float().T.contiguous()  # [K, D]
    inputs = F.pad(x[low:end].float(), (0, 0, before - (begin - low), 0))  # [K-1 + tokens, D]
    # all windows at once, as if there were one sequence; then those that reach beyond their sequence's start, again
    y = _weigh([inputs[k : k + end - begin] for k in range(before + 1)], taps, bias)
    rows = packing.seq_idx[begin:end].long()
    since = torch.arange(begin, end) - packing.cu_seqlens.long()[rows]  # tokens of the same sequence before this one
    heads = ((since < before) & (rows < packing.num_rows)).nonzero()[:, 0]
    if heads.numel() > 0:
        windows = _head_windows(inputs, history, rows[heads], since[heads], heads)
        y = y.index_put((heads,), _weigh(windows, taps, bias))
    return F.silu(y).to(x.dtype)


def _weigh(windows: list[Tensor], taps: Tensor, bias: Tensor | None) -> Tensor:
    """The sum over K inputs [tokens, D] of each by its tap, plus the bias."""
    y = windows[0] * taps[0] if bias is None else torch.addcmul(bias.float(), windows[0], taps[0])
    for window, tap in zip(windows[1:], taps[1:], strict=True):
        y = torch.addcmul(y, window, tap)
    return y


def _head_windows(inputs: Tensor, history: Tensor, rows: Tensor, since: Tensor, heads: Tensor) -> list[Tensor]:
    """The windows of the first K-1 tokens of sequences, K tensors [heads, D]: from history, then from the inputs."""
    before = history.shape[2]
    windows = []
    for k in range(before):
        old = history[rows, :, (since + k).clamp(max=before - 1)].to(inputs.dtype)
        windows.append(torch.where((since + k < before)[:, None], old, inputs[heads + k]))
    return [*windows, inputs[heads + before]]


def _conv_tail(x: Tensor, history: Tensor, packing: Packing) -> Tensor:
    """The last K-1 inputs of each sequence [B, D, K-1], reaching into its history where it is shorter than that."""
    width = history.shape[2]
    bounds = packing.cu_seqlens.long()
    lengths = bounds.diff()
    position = lengths[:, None] + torch.arange(width)  # [B, K-1] in history followed by the sequence
    token = (bounds[:-1, None] + position - width).clamp(0, packing.num_tokens - 1)
    index = position.clamp(max=width - 1)[:, None, :].expand_as(history)
    old = torch.gather(history, 2, index)
    return torch.where((position < width)[:, None, :], old, x[token].transpose(1, 2).to(history.dtype))


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor) -> Tensor:
    """See ``mamba_core.ops.causal_conv1d_step``."""
    window = torch.cat([state[slots].to(x.dtype), x[:, :, None]], dim=2)  # [B, D, K]
    state[slots] = window[:, :, 1:].detach().to(state.dtype)
    y = (window.float() * weight.float()).sum(2)
    if bias is not None:
        y = y + bias.float()
    return F.silu(y).to(x.dtype)


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
    """See ``mamba_core.ops.selective_scan``."""
    if packing.num_tokens == 0:
        return torch.empty_like(x)
    inputs = _ScanInputs(x, dt, A.float().T.contiguous(), B, C, D.float(), z, dt_bias.float())
    if _wants_grad(x, dt, A, B, C, D, z, dt_bias):
        tokens, outputs = [], []
        for rows in _row_groups(packing, A.numel()):
            for chunk in _scan_rows(inputs, state, rows):
                tokens.append(chunk[0])
                outputs.append(chunk[1])
        return torch.cat(outputs)[torch.cat(tokens).argsort()]
    y = torch.empty(x.shape, dtype=x.dtype)
    for rows in _row_groups(packing, A.numel()):
        for token, output in _scan_rows(inputs, state, rows):
            y[token] = output
    return y


@dataclass(frozen=True, slots=True)
class _ScanInputs:
    """Arguments of a scan; A is transposed, [N, D], so that the inner dimension of every product is long."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    dt_bias: Tensor


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sequences that advance together, longest first: where each begins, its length, its slot."""

    begins: Tensor
    lengths: Tensor
    slots: Tensor


def _row_groups(packing: Packing, state_elements: int) -> Iterator[_Rows]:
    """The non-empty sequences of a call, longest first, in groups whose states fit the cache."""
    bounds = packing.cu_seqlens.long()
    lengths = bounds.diff()
    order = lengths.argsort(descending=True, stable=True)
    order, size = order[: int((lengths > 0).sum())], max(1, _ELEMENTS_PER_TOKEN // state_elements)
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        yield _Rows(bounds[rows], lengths[rows], packing.slots[rows])


def _scan_rows(inputs: _ScanInputs, state: Tensor, rows: _Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Scan one group chunk by chunk: yields (tokens [M], outputs [M, D]), then leaves the states in their slots."""
    h = state[rows.slots].float().transpose(1, 2).contiguous()  # [rows, N, D]
    size = max(1, _ELEMENTS_PER_CHUNK // h.numel())
    buffers = _Buffers(torch.empty(0), torch.empty(0))
    for begin in range(0, int(rows.lengths[0]), size):
        num_active = int((rows.lengths > begin).sum())
        length = min(size, int(rows.lengths[0]) - begin)
        offset = torch.arange(begin, begin + length)[:, None]  # [chunk, 1]
        live = offset < rows.lengths[:num_active]  # [chunk, rows]
        # a row that ends inside the chunk repeats its last token with delta = 0, which leaves its state as it is
        token = rows.begins[:num_active] + torch.minimum(offset, rows.lengths[:num_active] - 1)
        y, end = _scan_chunk(inputs, token, live, h[:num_active], buffers)
        h = torch.cat([end, h[num_active:]]) if num_active < h.shape[0] else end
        yield token[live], y[live]
    state[rows.slots] = h.detach().transpose(1, 2).to(state.dtype)


@dataclass(slots=True)
class _Buffers:
    """Memory kept from chunk to chunk: the decays, and the state inputs that become the states."""

    decay: Tensor
    states: Tensor

    def take(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        if self.decay.shape != torch.Size(shape):
            self.decay, self.states = torch.empty(shape), torch.empty(shape)
        return self.decay, self.states


def _scan_chunk(
    inputs: _ScanInputs, token: Tensor, live: Tensor, h: Tensor, buffers: _Buffers
) -> tuple[Tensor, Tensor]:
    """One chunk, token and live [chunk, rows], from states h [rows, N, D]: outputs [chunk, rows, D], last states."""
    x = inputs.x[token].float()
    delta = F.softplus(inputs.dt[token].float() + inputs.dt_bias)
    delta = torch.where(live[:, :, None], delta, 0.0)
    b = inputs.B[token].float()[:, :, :, None]  # [chunk, rows, N, 1]
    rate, gain = delta[:, :, None, :], (delta * x)[:, :, None, :]  # [chunk, rows, 1, D]
    if _wants_grad(x, rate, inputs.A, b):
        states = _recur(torch.exp(rate * inputs.A), gain * b, h)
    else:
        decay, states = buffers.take((*token.shape, *inputs.A.shape))
        torch.mul(rate, inputs.A, out=decay).exp_()
        torch.mul(gain, b, out=states)
        for t in range(token.shape[0]):
            h = torch.addcmul(states[t], decay[t], h, out=states[t])
    c = inputs.C[token].float()[:, :, None, :]  # [chunk, rows, 1, N]
    y = torch.matmul(c, states)[:, :, 0, :] + inputs.D * x
    y = y * F.silu(inputs.z[token].float())
    # the buffer is overwritten by the next chunk, which still needs this state
    last = states[-1] if states.requires_grad else states[-1].clone()
    return y.to(inputs.x.dtype), last


def _recur(decay: Tensor, states: Tensor, h: Tensor) -> Tensor:
    """The recurrence out of place, for autograd: all [chunk, rows, N, D] states."""
    every = []
    for t in range(decay.shape[0]):
        h = torch.addcmul(states[t], decay[t], h)
        every.append(h)
    return torch.stack(every)


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
    """See ``mamba_core.ops.selective_scan_step``."""
    xf = x.float()
    delta = F.softplus(dt.float() + dt_bias.float())  # [B, D]
    h = state[slots].float()  # [B, D, N]
    h = torch.exp(delta[:, :, None] * A.float()) * h + (delta * xf)[:, :, None] * B.float()[:, None, :]
    state[slots] = h.detach().to(state.dtype)
    y = torch.matmul(h, C.float()[:, :, None])[:, :, 0] + D.float() * xf
    return (y * F.silu(z.float())).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See ``mamba_core.ops.rms_norm``."""
    xf = x.float()
    y = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``mamba_core.ops.rms_norm_residual``."""
    total = (residual.float() + x.float()).to(residual.dtype)
    return rms_norm(total.float(), weight, eps).to(weight.dtype), total
