"""Every backend's RMS norms are the reference's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba_core.ops import reference, triton
from mamba_core.ops.triton import norm as triton_norm
from tests.core.ops_cases import Backend, error_ratio, make_backend, poison_memory

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=["cpu", "numba", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    poison_memory(monkeypatch)
    return make_backend(request.param)


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 384), (37, 5), (200, 16), (7, 2560), (0, 64)])
def test_norm_equals_reference(backend: Backend, rows: int, width: int, has_weight: bool, dtype: torch.dtype) -> None:
    # a slice of a wider tensor: rows are strided
    x = random(rows, 2 * width + 3, dtype=dtype, device=backend.device)[:, 3 : 3 + width]
    weight = random(width, dtype=dtype, device=backend.device, seed=1) if has_weight else None
    y = backend.ops.rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    assert y.shape == x.shape
    expected = reference.rms_norm(x.float(), None if weight is None else weight.float(), EPS)
    assert rows == 0 or error_ratio(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("rows", "width"), [(1, 384), (37, 33), (0, 64)])
def test_norm_with_residual_equals_reference(
    backend: Backend, rows: int, width: int, dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    x = random(rows, width, dtype=dtype, device=backend.device)
    residual = random(rows, width, dtype=residual_dtype, device=backend.device, seed=2)
    weight = random(width, dtype=dtype, device=backend.device, seed=1)
    kept = residual.clone()
    y, total = backend.ops.rms_norm_residual(x, residual, weight, EPS)
    _, expected_total = reference.rms_norm_residual(x, residual, weight, EPS)
    assert (y.dtype, total.dtype) == (dtype, residual_dtype)
    if residual_dtype == torch.bfloat16 and backend.device == "cpu" and backend.ops is triton:
        # the interpreter cuts bf16 off where a GPU rounds
        assert rows == 0 or error_ratio(total, expected_total) < TOLERANCE[dtype]
    else:
        assert torch.equal(total, expected_total)
    assert torch.equal(residual, kept)
    # the norm is of what was kept, rounding included
    assert rows == 0 or error_ratio(y, reference.rms_norm(total.float(), weight, EPS)) < TOLERANCE[dtype]


def test_zero_row_is_finite(backend: Backend) -> None:
    x = torch.zeros(2, 16, device=backend.device)
    assert torch.equal(backend.ops.rms_norm(x, None, EPS), x)


def norm_gradients(backend: Backend | None, x: Tensor, weight: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight) if t is not None]
    ops = reference if backend is None else backend.ops
    y = ops.rms_norm(leaves[0], leaves[1] if weight is not None else None, EPS)
    (y * random(*y.shape, device=str(y.device), seed=5)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("has_weight", [True, False])
def test_gradients_of_the_norm(backend: Backend, has_weight: bool) -> None:
    x = random(70, 37, device=backend.device)
    weight = random(37, device=backend.device, seed=1) if has_weight else None
    actual, expected = norm_gradients(backend, x, weight), norm_gradients(None, x, weight)
    assert len(actual) == 1 + has_weight
    for one, other in zip(actual, expected, strict=True):
        assert error_ratio(one, other) < 1e-5


def residual_gradients(ops: object, inputs: list[Tensor], use_norm: bool, use_total: bool) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y, total = ops.rms_norm_residual(*leaves, EPS)  # type: ignore[attr-defined]
    loss = torch.zeros((), device=y.device)
    if use_norm:
        loss = loss + (y.float() * random(*y.shape, device=str(y.device), seed=5)).sum()
    if use_total:
        loss = loss + (total.float() * random(*y.shape, device=str(y.device), seed=6)).sum()
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("programs", [512, 3])
@pytest.mark.parametrize(("use_norm", "use_total"), [(True, True), (True, False), (False, True)])
def test_gradients_of_the_norm_with_residual(
    backend: Backend, use_norm: bool, use_total: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_norm, "_BACKWARD_PROGRAMS", programs)
    monkeypatch.setattr(triton_norm, "_TILE_ELEMENTS", 256)
    inputs = [random(*s, device=backend.device, seed=i) for i, s in enumerate([(70, 37), (70, 37), (37,)])]
    actual = residual_gradients(backend.ops, inputs, use_norm, use_total)
    expected = residual_gradients(reference, inputs, use_norm, use_total)
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None) or not (one if one is not None else other).any()
        if one is not None and other is not None:
            assert error_ratio(one, other) < 1e-5


def test_gradients_keep_their_tensors_dtypes(backend: Backend) -> None:
    x, weight = (random(*s, dtype=torch.bfloat16, device=backend.device).requires_grad_() for s in ((9, 37), (37,)))
    residual = random(9, 37, device=backend.device).requires_grad_()
    y, total = backend.ops.rms_norm_residual(x, residual, weight, EPS)
    (y.float().sum() + total.square().sum()).backward()
    assert [t.grad.dtype for t in (x, residual, weight) if t.grad is not None] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]
