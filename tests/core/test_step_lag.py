"""States that lack a token now and then: the same bits as those that never do, whichever slots lack one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mamba_core.ops.lag import BEHIND, WRITTEN, Lag
from mamba_core.ops.triton.persistent_step import LayerWeights, locate
from mamba_core.ops.triton.step import Step, advance
from mamba_core.ops.triton.step_lag import settle, turn
from mamba_core.ops.triton.step_tiles import SOME_ROWS
from tests.core.ops_cases import poison_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off where a GPU rounds it; the kernels take either
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
LAYERS, SLOTS, ROWS = 2, SOME_ROWS + 20, SOME_ROWS + 1


@dataclass(frozen=True, slots=True)
class Case:
    """Weights of some layers (dt_proj, its bias, A and D), and the states of their slots."""

    weights: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    states: Tensor
    lag: Lag

    def settle(self, slots: Tensor) -> None:
        settle(locate([layer_of(weights) for weights in self.weights], None), self.states, self.lag, slots)


def layer_of(weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> LayerWeights:
    """With the address of dt_proj in place of all that a settled state does not depend on."""
    dt_proj, dt_bias, decay, _ = weights
    return LayerWeights(**dict.fromkeys(LayerWeights.__slots__, dt_proj) | {"dt_bias": dt_bias, "decay": decay})


def make_case(dim: int, rank: int, states: int) -> Case:
    generator = torch.Generator().manual_seed(dim)

    def random(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(DEVICE)

    weights = [
        (random(dim, rank, scale=0.1), random(dim), -random(dim, states, dtype=torch.float32).exp(), random(dim))
        for _ in range(LAYERS)
    ]
    lag = Lag.zeros(LAYERS, SLOTS, dim, states, dtype=DTYPE, device=DEVICE)
    # what was never kept must never be read
    lag.inputs.fill_(torch.nan)
    lag.b.fill_(torch.nan)
    return Case(weights, random(LAYERS, SLOTS, dim, states, dtype=torch.float32), lag)


@pytest.mark.parametrize(("dim", "rank", "states", "inner_eps"), [(64, 4, 16, None), (70, 7, 5, 1e-5)])
@torch.inference_mode()
def test_states_that_lag_are_equal_in_the_end(
    monkeypatch: pytest.MonkeyPatch, dim: int, rank: int, states: int, inner_eps: float | None
) -> None:
    case = make_case(dim, rank, states)
    plain, lag = case.states.clone(), case.lag
    generator = torch.Generator().manual_seed(1)
    poison_memory(monkeypatch)
    for number in range(4):
        slots = torch.randperm(SLOTS, generator=generator)[:ROWS].to(DEVICE)
        step = Step(slots, torch.zeros(0, dtype=torch.int32), 1e-5)
        for layer, weights in enumerate(case.weights):
            xz = torch.randn(ROWS, 2 * dim, generator=generator).to(DTYPE).to(DEVICE)
            low = torch.randn(ROWS, rank + 2 * states, generator=generator).to(DTYPE).to(DEVICE)
            expected = advance(step, xz, low, *weights, plain[layer], inner_eps)
            y = advance(step, xz, low, *weights, case.states[layer], inner_eps, lag.layer(layer))
            assert torch.equal(y, expected)
        before = lag.phases[slots]
        turn(slots, lag)
        left = (before == WRITTEN) | ((before == 0) & (slots % 2 == 0))
        assert torch.equal(lag.phases[slots], torch.where(left, BEHIND, WRITTEN).int())
        behind = lag.phases == BEHIND
        assert torch.equal(case.states[:, ~behind], plain[:, ~behind])
        assert not torch.equal(case.states[:, behind], plain[:, behind])
        if number == 2:
            some = slots[1:20]
            case.settle(some)
            assert torch.equal(case.states[:, some], plain[:, some])
            assert not lag.phases[some].any()
        assert lag.phases.unique().numel() == 3
    case.settle(torch.arange(SLOTS, device=DEVICE))
    assert torch.equal(case.states, plain)
    assert not lag.phases.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_told_without_memory(dtype: torch.dtype) -> None:
    lag = Lag.zeros(3, 7, 10, 4, dtype=dtype, device="cpu")
    assert lag.nbytes == 7 * Lag.slot_bytes(3, 10, 4, dtype)
    of_layer = lag.layer(2)
    of_layer.inputs[5] = 1.0
    assert lag.inputs[2, 5].all()
    assert lag.inputs.count_nonzero() == 20
    assert of_layer.phases is lag.phases
