"""Inputs for the tests of the ops: packed, strided, with slots out of order, on the backend's device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_core import ops
from mamba_core.ops import Packing, cpu, triton

SCAN_INPUTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
NUM_SLOTS = 9


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of the ops and where its tensors live: without a GPU, Triton is interpreted on the CPU."""

    ops: ModuleType
    device: str


def make_backend(name: str) -> Backend:
    if name == "cpu":
        return Backend(cpu, "cpu")
    if name == "numba":
        # with gradients they are torch's
        return Backend(ops, "cpu")
    return Backend(triton, "cuda" if torch.cuda.is_available() else "cpu")


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever is allocated without a value with NaN, so that an element nobody writes is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        return fill(empty(*args, **kwargs))

    def poisoned_empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return fill(empty_like(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", poisoned_empty_like)


def make_packing(lengths: list[int], device: str, num_slots: int = NUM_SLOTS) -> Packing:
    """Sequences of these lengths in distinct slots, not in their order, and never slot 0."""
    slots = 1 + torch.randperm(num_slots - 1, generator=torch.Generator().manual_seed(1))[: len(lengths)]
    return Packing.from_lengths(lengths, slots.to(device))


@dataclass(frozen=True, slots=True)
class ScanCase:
    """Arguments of a selective scan by name, and the pool of states it starts from."""

    inputs: dict[str, Tensor]
    state: Tensor
    packing: Packing

    def in_float32(self) -> ScanCase:
        return replace(self, inputs={name: t.float() for name, t in self.inputs.items()})

    def with_grad(self) -> ScanCase:
        return replace(self, inputs={name: t.detach().clone().requires_grad_() for name, t in self.inputs.items()})

    def tokens(self, begin: int, end: int, packing: Packing) -> ScanCase:
        per_token = {name: self.inputs[name][begin:end] for name in ("x", "dt", "B", "C", "z")}
        return replace(self, inputs=self.inputs | per_token, packing=packing)

    def run(self, ops: ModuleType, state: Tensor) -> Tensor:
        return ops.selective_scan(**self.inputs, state=state, packing=self.packing)


def make_scan(
    lengths: list[int],
    num_channels: int,
    num_states: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    state_dtype: torch.dtype = torch.float32,
) -> ScanCase:
    """A scan as the model makes it: x and z are halves of one projection, B and C slices of another."""
    generator = torch.Generator().manual_seed(sum(lengths) + num_channels)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    total = sum(lengths)
    xz = random(total, 2 * num_channels).to(device, dtype)
    low_rank = random(total, 8 + 2 * num_states).to(device, dtype)
    inputs = {
        "x": xz[:, :num_channels],
        "dt": (random(total, num_channels) - 2).to(device, dtype),
        "A": -torch.arange(1, num_states + 1).repeat(num_channels, 1).to(device, torch.float32),
        "B": low_rank[:, 8 : 8 + num_states],
        "C": low_rank[:, 8 + num_states :],
        "D": random(num_channels).to(device, dtype),
        "z": xz[:, num_channels:],
        "dt_bias": random(num_channels).to(device, dtype),
    }
    state = random(NUM_SLOTS, num_channels, num_states).to(device, state_dtype)
    return ScanCase(inputs, state, make_packing(lengths, device))


@dataclass(frozen=True, slots=True)
class ConvCase:
    """Arguments of a causal convolution, and the pool of states it starts from."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor
    packing: Packing

    def in_float32(self) -> ConvCase:
        bias = None if self.bias is None else self.bias.float()
        return replace(self, x=self.x.float(), weight=self.weight.float(), bias=bias, state=self.state.float())

    def run(self, ops: ModuleType, state: Tensor) -> Tensor:
        return ops.causal_conv1d(self.x, self.weight, self.bias, state, self.packing)


def make_conv(
    lengths: list[int],
    num_channels: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    has_bias: bool = True,
) -> ConvCase:
    generator = torch.Generator().manual_seed(sum(lengths) + num_channels + width)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = random(sum(lengths), 2 * num_channels)[:, num_channels:]
    bias = random(num_channels) if has_bias else None
    state = random(NUM_SLOTS, num_channels, width - 1)
    return ConvCase(x, random(num_channels, width), bias, state, make_packing(lengths, device))


def by_taps(state: Tensor) -> Tensor:
    """A copy of a convolution's state [..., D, K-1] as GPUs keep it: all channels of a tap together."""
    return state.mT.clone(memory_format=torch.contiguous_format).mT


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN anywhere gives NaN, which no bound admits."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def untouched(packing: Packing, num_slots: int = NUM_SLOTS) -> Tensor:
    """The slots that no non-empty sequence of the call owns."""
    lengths = packing.cu_seqlens.diff()
    owned = set(packing.slots[lengths > 0].tolist())
    return torch.tensor([slot for slot in range(num_slots) if slot not in owned], device=packing.slots.device)
