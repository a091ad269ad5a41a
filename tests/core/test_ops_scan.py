"""Every backend's selective scan is the reference's, forward and backward, whole or in pieces."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_core.ops import Packing, cpu, reference, triton
from mamba_core.ops.triton import scan as triton_scan
from tests.core.ops_cases import (
    SCAN_INPUTS,
    Backend,
    ScanCase,
    error_ratio,
    make_backend,
    make_packing,
    make_scan,
    poison_memory,
    untouched,
)

# one rounding to the output's dtype, and the difference between two orders of summation in fp32
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}

SHAPES = [([1], 64, 16), ([63], 97, 5), ([3, 0, 17, 1], 97, 16), ([20, 40], 64, 5)]


@pytest.fixture(params=["cpu", "numba", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    poison_memory(monkeypatch)
    return make_backend(request.param)


def check(case: ScanCase, ops: ModuleType, tolerance: float, state_tolerance: float = 3e-6) -> None:
    """Outputs and new states as the reference's in fp32; all other slots as they were, bit by bit."""
    state, expected_state = case.state.clone(), case.state.float()
    y = case.run(ops, state)
    expected = case.in_float32().run(reference, expected_state)
    assert y.dtype == case.inputs["x"].dtype
    assert error_ratio(y, expected) < tolerance
    slots = case.packing.slots
    assert error_ratio(state[slots], expected_state[slots]) < state_tolerance
    others = untouched(case.packing)
    assert torch.equal(state[others], case.state[others])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("lengths", "num_channels", "num_states"), SHAPES)
def test_equals_reference(
    backend: Backend, lengths: list[int], num_channels: int, num_states: int, dtype: torch.dtype
) -> None:
    check(make_scan(lengths, num_channels, num_states, dtype, backend.device), backend.ops, TOLERANCE[dtype])


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_state_is_rounded_once(backend: Backend, state_dtype: torch.dtype) -> None:
    case = make_scan([9, 2], 64, 16, device=backend.device, state_dtype=state_dtype)
    check(case, backend.ops, 3e-6, state_tolerance=4e-3)


def test_no_tokens_at_all(backend: Backend) -> None:
    case = make_scan([0, 0], 64, 16, device=backend.device)
    state = case.state.clone()
    assert case.run(backend.ops, state).shape == (0, 64)
    assert torch.equal(state, case.state)


@pytest.mark.parametrize("lengths", [[20, 0, 33, 0], [0, 0], [3], [130, 0, 0, 1]])
def test_tokens_after_the_last_sequence_belong_to_none(backend: Backend, lengths: list[int]) -> None:
    case = make_scan(lengths, 64, 16, device=backend.device)
    state, expected_state = case.state.clone(), case.state.clone()
    expected = case.run(reference, expected_state)
    # more room than there are tokens, and junk in it
    total = sum(lengths) + 300
    junk = {
        name: torch.cat([t, t.new_full((300, t.shape[1]), torch.nan)]) if name in ("x", "dt", "B", "C", "z") else t
        for name, t in case.inputs.items()
    }
    packing = replace(case.packing, num_tokens=total, max_seqlen=total)
    y = replace(case, inputs=junk, packing=packing).run(backend.ops, state)
    assert error_ratio(y[: sum(lengths)], expected) < TOLERANCE[torch.float32]
    assert error_ratio(state, expected_state) < 3e-6
    others = untouched(case.packing)
    assert torch.equal(state[others], case.state[others])


def test_two_chunks_equal_one(backend: Backend) -> None:
    case = make_scan([37], 64, 16, device=backend.device)
    whole, pieces = case.state.clone(), case.state.clone()
    expected = case.run(backend.ops, whole)
    slots = case.packing.slots
    parts = [case.tokens(a, b, Packing.from_lengths([b - a], slots)) for a, b in ((0, 20), (20, 37))]
    y = torch.cat([part.run(backend.ops, pieces) for part in parts])
    assert error_ratio(y, expected) < 1e-6
    assert error_ratio(pieces, whole) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_channels", "num_states"), [(64, 16), (97, 5)])
def test_step_equals_scan_of_ones(backend: Backend, num_channels: int, num_states: int, dtype: torch.dtype) -> None:
    case = make_scan([1] * 5, num_channels, num_states, dtype, backend.device)
    state, expected_state, scanned_state = case.state.clone(), case.state.clone(), case.state.clone()
    y = backend.ops.selective_scan_step(**case.inputs, state=state, slots=case.packing.slots)
    expected = case.in_float32().run(reference, expected_state)
    assert error_ratio(y, expected) < TOLERANCE[dtype]
    assert error_ratio(y, case.run(backend.ops, scanned_state)) < TOLERANCE[dtype]
    assert error_ratio(state, expected_state) < 1e-6
    assert error_ratio(state, scanned_state) < 1e-6
    others = untouched(case.packing)
    assert torch.equal(state[others], case.state[others])


@pytest.mark.parametrize("is_step", [False, True])
def test_nan_stays_in_its_row(backend: Backend, is_step: bool) -> None:
    case = make_scan([1] * 3 if is_step else [5, 4, 3], 64, 16, device=backend.device)
    first, second, third = case.packing.slots.tolist()
    state = case.state.clone()
    state[second] = float("nan")
    y = case.run(backend.ops, state)
    bounds = case.packing.cu_seqlens.tolist()
    assert y[bounds[1] : bounds[2]].isnan().all()
    assert y[: bounds[1]].isfinite().all()
    assert y[bounds[2] :].isfinite().all()
    assert state[[first, third]].isfinite().all()


# numpy, which interprets the kernels, warns of exp(300) = inf; its reciprocal is the right sigmoid
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_extreme_inputs_stay_finite(backend: Backend) -> None:
    case = make_scan([8], 64, 16, device=backend.device)
    extremes = torch.tensor([-300.0, -90, -20, -1e-6, 1e-6, 19.9, 20.1, 90], device=backend.device)
    case.inputs["dt"].copy_(extremes[:, None].expand(8, 64))
    case.inputs["z"].copy_(extremes.flip(0)[:, None].expand(8, 64))
    check(case, backend.ops, 3e-6)


def gradients(case: ScanCase, ops: ModuleType) -> dict[str, Tensor]:
    state = case.state.clone()
    y = case.run(ops, state)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device)
    (y.float() * dy).sum().backward()
    return {name: t.grad for name, t in case.inputs.items() if t.grad is not None}


@pytest.mark.parametrize(("lengths", "num_channels", "num_states"), [([17, 0, 1, 40], 33, 5), ([16, 3], 64, 16)])
def test_gradients_equal_the_references(
    backend: Backend, lengths: list[int], num_channels: int, num_states: int
) -> None:
    case = make_scan(lengths, num_channels, num_states, device=backend.device)
    actual = gradients(case.with_grad(), backend.ops)
    expected = gradients(case.with_grad(), reference)
    assert set(actual) == set(SCAN_INPUTS)
    for name in SCAN_INPUTS:
        assert error_ratio(actual[name], expected[name]) < 1e-5, name


def test_gradients_do_not_flow_into_the_state(backend: Backend) -> None:
    case = make_scan([5], 64, 16, device=backend.device).with_grad()
    state = case.state.clone()
    case.run(backend.ops, state)
    assert not state.requires_grad
    assert not torch.equal(state, case.state)


def test_gradients_through_strided_rows(backend: Backend) -> None:
    base = make_scan([12, 5], 33, 5, device=backend.device)
    found = []
    for ops in (backend.ops, reference):
        xz = torch.cat([base.inputs["x"], base.inputs["z"]], dim=1).requires_grad_()
        x, z = xz.chunk(2, dim=1)
        case = ScanCase(base.inputs | {"x": x, "z": z}, base.state.clone(), base.packing)
        case.run(ops, case.state).sum().backward()
        found.append(xz.grad)
    assert found[0] is not None
    assert found[1] is not None
    assert error_ratio(found[0], found[1]) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_no_states_of_all_tokens_on_a_cpu() -> None:
    case = make_scan([20_000, 300], 64, 16)
    with LargestTensor() as largest:
        case.run(cpu, case.state.clone())
    # the output is the largest thing there is; the states of all tokens would be sixteen times that
    assert largest.num_elements <= 20_300 * 64


def test_chunks_and_groups_of_the_cpu_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_scan([7, 30, 0, 12, 12], 33, 5)
    check(case, cpu, 3e-6)
    monkeypatch.setattr(cpu, "_ELEMENTS_PER_CHUNK", 33 * 5 * 8)
    check(case, cpu, 3e-6)
    monkeypatch.setattr(cpu, "_ELEMENTS_PER_TOKEN", 33 * 5 * 2)
    check(case, cpu, 3e-6)


@pytest.mark.parametrize("lengths", [[63], [40, 0, 5, 33]])
def test_segments_leave_no_trace(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    monkeypatch.setattr(triton_scan, "_LEAST_SEGMENT", 16)
    triton = make_backend("triton")
    case = make_scan(lengths, 64, 16, device=triton.device)
    assert triton_scan.segment_length(case.packing, 64) == 16
    check(case, triton.ops, 3e-6)
    actual, expected = gradients(case.with_grad(), triton.ops), gradients(case.with_grad(), reference)
    for name in SCAN_INPUTS:
        assert error_ratio(actual[name], expected[name]) < 1e-5, name


def test_backward_walks_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "_BACKWARD_ROWS", 2)
    triton = make_backend("triton")
    case = make_scan([3, 17, 0, 2, 5], 33, 5, device=triton.device)
    actual, expected = gradients(case.with_grad(), triton.ops), gradients(case.with_grad(), reference)
    for name in SCAN_INPUTS:
        assert error_ratio(actual[name], expected[name]) < 1e-5, name


def test_many_sequences_are_not_cut_up() -> None:
    packing = make_packing([4096] * 8, "cpu")
    assert triton_scan.segment_length(packing, 5120) == 4096
    assert triton_scan.segment_length(make_packing([4096], "cpu"), 1536) < 4096


@pytest.mark.parametrize("num_states", [1, 2, 5, 16, 17, 64, 256])
@pytest.mark.parametrize("lengths", [[1], [4096], [4096, 0, 1], [30] * 256, [100_000]])
def test_tilings_hold_every_state_and_token_once(lengths: list[int], num_states: int) -> None:
    packing = make_packing(lengths, "cpu", num_slots=300)
    for num_channels in (1, 96, 1536, 5120):
        tiling, length = triton_scan.choose_tiling(packing, num_channels, num_states)
        states = triton_scan.states_per_lane(tiling, num_states)
        assert tiling.groups * states >= num_states
        assert tiling.groups <= 16
        assert states <= 16
        # every lane of a channel takes as many tokens of a tile
        assert tiling.tile % tiling.groups == 0
        # a multiprocessor has 65,536 registers
        assert 32 * tiling.warps * tiling.registers <= 65536
        assert length >= 1
        # checkpoints lie on tiles
        assert length == packing.max_seqlen or length % tiling.tile == 0


def test_few_channels_are_shared_out_among_more_lanes_and_segments() -> None:
    def plan(lengths: list[int], num_channels: int) -> tuple[int, int]:
        tiling, length = triton_scan.choose_tiling(make_packing(lengths, "cpu", num_slots=300), num_channels, 16)
        return tiling.groups, length

    assert plan([2048] * 256, 1536) == (1, 2048)
    groups, length = plan([2048], 1536)
    assert groups > 1
    assert length < 2048
    # what is long beside short ones has the machine to itself
    assert plan([2048, 1, 2], 1536) == (groups, length)
    # beside others of its kind it has not
    packing = make_packing([2048], "cpu", num_slots=300)
    for num_channels, num_groups in ((5120, 4), (1536, 8)):
        beside = dataclasses.replace(packing, num_beside=4)
        tiling, length = triton_scan.choose_tiling(beside, num_channels, 16)
        assert (tiling.groups, length) == (num_groups, 2048)


def test_state_of_scattered_slots_is_refused(backend: Backend) -> None:
    if backend.ops is not triton:
        pytest.skip("any strides do on a CPU")
    case = make_scan([3], 64, 16, device=backend.device)
    with pytest.raises(ValueError, match="contiguous"):
        case.run(backend.ops, case.state.transpose(1, 2).contiguous().transpose(1, 2))
