"""Every backend's causal convolution is the reference's, forward and backward, whole or in pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mamba_core.ops import Packing, cpu, reference
from mamba_core.ops.triton import conv as triton_conv
from tests.core.ops_cases import (
    Backend,
    ConvCase,
    by_taps,
    error_ratio,
    make_backend,
    make_conv,
    poison_memory,
    untouched,
)

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}

SHAPES = [([1], 64, 4), ([63], 97, 2), ([3, 0, 17, 1, 2], 97, 5), ([20, 40], 64, 3)]


@pytest.fixture(params=["cpu", "numba", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    poison_memory(monkeypatch)
    return make_backend(request.param)


def check(case: ConvCase, backend: Backend, tolerance: float) -> None:
    state, expected_state = case.state.clone(), case.state.float()
    y = case.run(backend.ops, state)
    expected = case.in_float32().run(reference, expected_state)
    assert y.dtype == case.x.dtype
    assert error_ratio(y, expected) < tolerance
    # inputs are moved, not computed with
    assert torch.equal(state, expected_state.to(state.dtype))
    others = untouched(case.packing)
    assert torch.equal(state[others], case.state[others])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("lengths", "num_channels", "width"), SHAPES)
def test_equals_reference(
    backend: Backend, lengths: list[int], num_channels: int, width: int, has_bias: bool, dtype: torch.dtype
) -> None:
    check(make_conv(lengths, num_channels, width, dtype, backend.device, has_bias), backend, TOLERANCE[dtype])


def test_no_tokens_at_all(backend: Backend) -> None:
    case = make_conv([0, 0], 64, 4, device=backend.device)
    state = case.state.clone()
    assert case.run(backend.ops, state).shape == (0, 64)
    assert torch.equal(state, case.state)


@pytest.mark.parametrize("lengths", [[20, 0, 33, 0], [0, 0], [3]])
def test_tokens_after_the_last_sequence_belong_to_none(backend: Backend, lengths: list[int]) -> None:
    case = make_conv(lengths, 64, 4, device=backend.device)
    state, expected_state = case.state.clone(), case.state.clone()
    expected = case.run(reference, expected_state)
    # more room than there are tokens, and junk in it
    x = torch.cat([case.x, torch.full((40, 64), torch.nan, device=backend.device)])
    packing = replace(case.packing, num_tokens=len(x), max_seqlen=len(x))
    y = replace(case, x=x, packing=packing).run(backend.ops, state)
    assert error_ratio(y[: sum(lengths)], expected) < TOLERANCE[torch.float32]
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_two_chunks_equal_one(backend: Backend, cut: int) -> None:
    case = make_conv([37], 64, 4, device=backend.device)
    whole, pieces = case.state.clone(), case.state.clone()
    expected = case.run(backend.ops, whole)
    slots = case.packing.slots
    parts = [
        replace(case, x=case.x[a:b], packing=Packing.from_lengths([b - a], slots)) for a, b in ((0, cut), (cut, 37))
    ]
    y = torch.cat([part.run(backend.ops, pieces) for part in parts])
    assert error_ratio(y, expected) < 1e-6
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_step_equals_scan_of_ones(backend: Backend, width: int, dtype: torch.dtype) -> None:
    case = make_conv([1] * 5, 97, width, dtype, backend.device, has_bias=width % 2 == 0)
    state, scanned_state = case.state.clone(), case.state.clone()
    y = backend.ops.causal_conv1d_step(case.x, case.weight, case.bias, state, case.packing.slots)
    assert error_ratio(y, case.in_float32().run(reference, case.state.float())) < TOLERANCE[dtype]
    assert error_ratio(y, case.run(backend.ops, scanned_state)) < TOLERANCE[dtype]
    assert torch.equal(state, scanned_state)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("lengths", "num_channels", "width"), SHAPES)
def test_triton_takes_states_that_lie_by_taps(
    lengths: list[int], num_channels: int, width: int, dtype: torch.dtype
) -> None:
    triton = make_backend("triton")
    case = make_conv(lengths, num_channels, width, dtype, triton.device)
    by_channels, state = case.state.clone(), by_taps(case.state)
    assert torch.equal(case.run(triton.ops, state), case.run(triton.ops, by_channels))
    assert torch.equal(state, by_channels)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4, 5])
@pytest.mark.parametrize("num_channels", [97, 272])
def test_triton_steps_states_that_lie_by_taps(num_channels: int, width: int, dtype: torch.dtype) -> None:
    triton = make_backend("triton")
    case = make_conv([1] * 7, num_channels, width, dtype, triton.device, has_bias=width % 2 == 0)
    by_channels, state = case.state.clone(), by_taps(case.state)
    y, expected = (
        triton.ops.causal_conv1d_step(case.x, case.weight, case.bias, s, case.packing.slots)
        for s in (state, by_channels)
    )
    assert torch.equal(y, expected)
    assert torch.equal(state, by_channels)
    others = untouched(case.packing)
    assert torch.equal(state[others], case.state[others])


def test_triton_refuses_a_slot_with_gaps() -> None:
    triton = make_backend("triton")
    case = make_conv([5], 64, 4, device=triton.device)
    with pytest.raises(ValueError, match="each slot of the state must be contiguous, by channels or by taps"):
        case.run(triton.ops, case.state.repeat(1, 1, 2)[..., :3])
    with pytest.raises(ValueError, match="each slot of the state must be contiguous, by channels or by taps"):
        triton.ops.causal_conv1d_step(
            case.x[:1], case.weight, None, case.state.repeat(1, 2, 1)[:, ::2], case.packing.slots
        )


def gradients(case: ConvCase, backend: Backend | None, *, is_by_taps: bool = False) -> list[Tensor]:
    state = by_taps(case.state) if is_by_taps else case.state.clone()
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    ops = reference if backend is None else backend.ops
    y = ops.causal_conv1d(*leaves[:2], leaves[2] if case.bias is not None else None, state, case.packing)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device)
    (y * dy).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_gradients_equal_the_references(backend: Backend, width: int, has_bias: bool) -> None:
    case = make_conv([17, 0, 1, 2, 40], 97, width, device=backend.device, has_bias=has_bias)
    actual, expected = gradients(case, backend), gradients(case, None)
    assert len(actual) == len(expected) == 2 + has_bias
    for one, other in zip(actual, expected, strict=True):
        assert error_ratio(one, other) < 1e-5


def test_gradients_reach_past_states_that_lie_by_taps() -> None:
    triton = make_backend("triton")
    case = make_conv([17, 0, 1, 2, 40], 97, 4, device=triton.device)
    for one, other in zip(gradients(case, triton, is_by_taps=True), gradients(case, triton), strict=True):
        assert torch.equal(one, other)


def test_gradients_of_more_tokens_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_conv, "_BACKWARD_PROGRAMS", 2)
    triton = make_backend("triton")
    case = make_conv([30, 0, 9, 20, 40], 33, 4, device=triton.device)
    for one, other in zip(gradients(case, triton), gradients(case, None), strict=True):
        assert error_ratio(one, other) < 1e-5


def test_token_chunks_of_the_cpu_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_conv([7, 1, 30, 0, 2], 33, 4)
    monkeypatch.setattr(cpu, "_CONV_ELEMENTS", 33 * 5)
    check(case, make_backend("cpu"), 3e-6)
