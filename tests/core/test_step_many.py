"""The recurrence of many rows by programs that stay with their channels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mamba_core.ops.lag import Lag
from mamba_core.ops.triton import devices, step_many, step_tiles
from mamba_core.ops.triton.step import Step, advance
from mamba_core.ops.triton.step_many import fits, rows_of_program
from mamba_core.ops.triton.step_products import has_pdl
from tests.core.ops_cases import poison_memory
from tests.core.step_cases import error

# of an H200
MULTIPROCESSORS = 132


@pytest.mark.parametrize(("rows", "dim", "expected"), [(256, 5120, 16), (65, 5120, 5), (256, 1536, 5), (65, 64, 1)])
def test_all_programs_are_at_work_at_once(rows: int, dim: int, expected: int) -> None:
    own = rows_of_program(rows, dim, MULTIPROCESSORS)
    assert own == expected
    assert dim // 32 * -(-rows // own) <= 20 * MULTIPROCESSORS


def test_a_program_has_no_more_rows_than_a_warp_lanes() -> None:
    assert rows_of_program(1024, 8192, MULTIPROCESSORS) == 32
    assert rows_of_program(65, 2**20, 1) == 32


@pytest.mark.parametrize(
    ("is_served", "dim", "states", "dtype", "inner_eps", "capability"),
    [
        (True, 5120, 16, torch.float32, None, (9, 0)),
        (True, 64, 16, torch.float32, None, (8, 0)),
        (False, 64, 16, torch.float32, None, (7, 5)),
        (False, 80, 16, torch.float32, None, (9, 0)),
        (False, 64, 8, torch.float32, None, (9, 0)),
        (False, 64, 16, torch.bfloat16, None, (9, 0)),
        (False, 64, 16, torch.float32, 1e-5, (9, 0)),
    ],
)
def test_others_are_left_to_the_kernel_for_all(
    monkeypatch: pytest.MonkeyPatch,
    is_served: bool,
    dim: int,
    states: int,
    dtype: torch.dtype,
    inner_eps: float | None,
    capability: tuple[int, int],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(devices.triton.knobs.runtime, "interpret", False)
    decay = SimpleNamespace(shape=(dim, states), device=torch.device("cuda", 0))
    assert fits(decay, torch.empty(0, dtype=dtype), inner_eps) is is_served  # type: ignore[arg-type]


def test_from_fewer_rows_on_where_the_units_are_hoppers(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for has_wgmma, dim, expected in ((True, 5120, 16), (True, 2048, 16), (True, 1536, 32), (False, 5120, 64)):
        monkeypatch.setattr(step_tiles, "has_wgmma", lambda _, has=has_wgmma: has)
        assert step_tiles.some_rows(dim, device) == expected


@pytest.mark.parametrize(("index", "hip", "expected"), [(8, None, True), (9, "6.4", False)])
def test_kernels_start_before_others_end_on_nvidias_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, index: int, hip: str | None, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(devices.triton.knobs.runtime, "interpret", False)
    assert has_pdl(torch.device("cuda", index)) is expected


def test_nothing_is_served_without_a_gpu() -> None:
    assert not fits(torch.empty(64, 16), torch.empty(0), None)


def step_in_fp64(
    xz: Tensor, low: Tensor, weights: tuple[Tensor, ...], states: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """y and the states of the rows, from the formula; the product of dt_proj rounded as it is kept."""
    dt_proj, bias, decay, skip = (w.double() for w in weights)
    dim, rank = dt_proj.shape
    raw = (low[:, :rank].double() @ dt_proj.T).to(xz.dtype).double()
    delta = torch.nn.functional.softplus(raw + bias)
    x, z = xz.double().split(dim, dim=1)
    b, c = low[:, rank:].double().split(16, dim=1)
    h = states[slots].double() * torch.exp(delta[..., None] * decay) + (delta * x)[..., None] * b[:, None]
    return ((h * c[:, None]).sum(-1) + skip * x) * torch.nn.functional.silu(z), h


@pytest.mark.gpu
@pytest.mark.parametrize("with_lag", [False, True])
@pytest.mark.parametrize("own_rows", [1, 2, 7, 16, 32])
@torch.inference_mode()
def test_equals_the_formula_whatever_rows_a_program_has(
    monkeypatch: pytest.MonkeyPatch, own_rows: int, with_lag: bool
) -> None:
    generator = torch.Generator("cuda").manual_seed(own_rows)
    rows, dim, rank = 75, 96, 6

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    weights = (random(dim, rank) * 0.1, random(dim), -random(dim, 16, dtype=torch.float32).exp(), random(dim))
    states = random(rows + 9, dim, 16, dtype=torch.float32)
    slots = torch.randperm(rows + 9, device="cuda")[:rows]
    lag = Lag.zeros(1, rows + 9, dim, 16, dtype=torch.bfloat16, device="cuda").layer(0) if with_lag else None
    xz, low = random(rows, 2 * dim), random(rows, rank + 32)
    expected_y, expected_h = step_in_fp64(xz, low, weights, states, slots)
    untouched = states.clone()

    poison_memory(monkeypatch)
    monkeypatch.setattr(step_many, "rows_of_program", lambda *_: own_rows)
    y = advance(Step(slots, torch.zeros(0, dtype=torch.int32), 1e-5), xz, low, *weights, states, None, lag)

    assert error(y, expected_y) < 4e-3
    left = slots % 2 == 0 if with_lag else torch.zeros_like(slots, dtype=torch.bool)
    assert torch.equal(states[slots[left]], untouched[slots[left]])
    assert error(states[slots[~left]], expected_h[~left]) < 1e-3
    others = torch.ones(rows + 9, dtype=torch.bool, device="cuda").index_fill_(0, slots, False)
    assert torch.equal(states[others], untouched[others])
