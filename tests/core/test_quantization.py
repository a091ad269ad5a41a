"""Weights in int8: what is kept of a matrix, however large."""

from __future__ import annotations

import pytest
import torch

from mamba_core.quantization import Int8Linear


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (1500, 1001), (2, 2**20 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_output_has_its_own_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_outputs, num_inputs = shape
    linear = torch.nn.Linear(num_inputs, num_outputs, bias=False, dtype=dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(num_outputs)[:, None]
    linear.weight.copy_(weight)
    kept = Int8Linear(linear)
    assert (kept.weight.dtype, kept.scales.dtype) == (torch.int8, torch.float32)
    exact = linear.weight.float()
    assert torch.allclose(kept.scales * 127, exact.abs().amax(1))
    assert not kept.weight[0].any()
    # half a step, and the rounding of fp32
    off = (kept.weight * kept.scales[:, None] - exact).abs()
    assert bool((off <= 0.5001 * kept.scales[:, None]).all())
