"""Products that torch has twice: whichever is taken, the results and the gradients are those of ``F.linear``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.ops import native, products
from mamba_core.ops.native import units
from mamba_core.ops.products import Linear, linear


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product of oneDNN, on a machine that prefers it."""
    if not units.has_onednn():
        pytest.skip("torch has been built without oneDNN")
    made: list[int] = []
    fast = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(native, "prefers_onednn", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *inputs: made.append(1) or fast(*inputs))
    return made


def error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 5), (40, 48), (2, 3, 33), (7,)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_torch(calls: list[int], shape: tuple[int, ...], has_bias: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(70, shape[-1])
    bias = torch.randn(70) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y = linear(x, weight, bias)
    assert y.dtype == torch.float32
    assert y.shape == expected.shape
    assert error(y, expected) < 1e-6
    assert calls == [1]


def test_rows_of_a_wider_matrix(calls: list[int]) -> None:
    x, weight = torch.randn(20, 96), torch.randn(31, 40)
    for part in (x[:, 8:48], x[::2, 8:48], x.T[:40, :20].T):
        assert error(linear(part, weight), part.double() @ weight.double().T) < 1e-6
    assert calls == [1, 1, 1]


def test_what_onednn_does_not_take_is_torchs(calls: list[int]) -> None:
    x, weight = torch.randn(6, 8), torch.randn(5, 8)
    assert linear(x[:0], weight).shape == (0, 5)
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    turned = weight.T.contiguous().T
    assert torch.equal(linear(x, turned), F.linear(x, turned))
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    assert calls == []


def test_gradients_flow(calls: list[int]) -> None:
    layer, same = Linear(8, 5), nn.Linear(8, 5)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(6, 8)
    for module in (layer, same):
        module(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, same.weight.grad)
    assert calls == []
    with torch.no_grad():
        assert error(layer(x), same(x).double()) < 1e-6
    assert calls == [1]


def test_no_cpu_but_amds_with_avx512_prefers_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "has_onednn", lambda: True)
    for name, has_avx512, expected in (
        ("znver5", True, True),
        ("znver3", False, False),
        ("sapphirerapids", True, False),
    ):
        monkeypatch.setattr(units.llvmlite.binding, "get_host_cpu_name", lambda name=name: name)
        monkeypatch.setattr(units, "_has_feature", lambda _, has_avx512=has_avx512: has_avx512)
        assert units.has_avx512_of_amd.__wrapped__() is expected
    monkeypatch.setattr(units, "has_avx512_of_amd", lambda: True)
    assert native.prefers_onednn()
    monkeypatch.setattr(native, "is_available", lambda: False)
    assert not products.native.prefers_onednn()
