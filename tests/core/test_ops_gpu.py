"""What only a GPU shows: compiled kernels at odd and at enormous sizes, against the reference in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba_core import ops
from mamba_core.ops import Packing, reference
from mamba_core.ops.triton import scan as triton_scan
from tests.core.ops_cases import (
    SCAN_INPUTS,
    ConvCase,
    ScanCase,
    error_ratio,
    make_conv,
    make_scan,
    poison_memory,
    untouched,
)

pytestmark = pytest.mark.gpu

UNEVEN = [500, 63, 1, 0, 317, 2]
# bf16: one rounding of the output; fp32: another order of summation and the hardware's exponential
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
# gradients in bf16 are rounded once on the way out, those of parameters summed in fp32 before
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


def check_scan(case: ScanCase, tolerance: float, state_tolerance: float = 1e-5) -> None:
    state, expected_state = case.state.clone(), case.state.float()
    y = case.run(ops, state)
    expected = case.in_float32().run(reference, expected_state)
    assert error_ratio(y, expected) < tolerance
    slots = case.packing.slots
    assert error_ratio(state[slots], expected_state[slots]) < state_tolerance
    others = untouched(case.packing)
    assert torch.equal(state[others], case.state[others])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[63], [500], [1], UNEVEN], ids=str)
@pytest.mark.parametrize(("num_channels", "num_states"), [(64, 16), (1536, 16), (1536 + 16, 16), (97, 5)])
def test_scan(lengths: list[int], num_channels: int, num_states: int, dtype: torch.dtype) -> None:
    check_scan(make_scan(lengths, num_channels, num_states, dtype, "cuda"), TOLERANCE[dtype])


# every one that is chosen, cut up or not, others, and the plain kernels
TILINGS = [
    *((tiling, False) for tiling in triton_scan._TILINGS.values()),
    (triton_scan._SEGMENT_TILING, True),
    (triton_scan.Tiling(8, 4, 32, 255), True),
    (triton_scan.Tiling(1, 1, 4, 96), True),
    (triton_scan.Tiling(2, 2, 16, 128), False),
    None,
]


@pytest.fixture
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is None:
        monkeypatch.setattr(triton_scan, "has_tiles", lambda *_: False)
        return
    tiling, is_cut_up = request.param
    monkeypatch.setattr(triton_scan, "_TILINGS", {0: tiling})
    monkeypatch.setattr(triton_scan, "_SEGMENT_TILING", tiling)
    monkeypatch.setattr(triton_scan, "_FEW_STREAMS", 10**9 if is_cut_up else 0)
    monkeypatch.setattr(triton_scan, "_LEAST_CUT_UP", 16)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("tiling", TILINGS, ids=str, indirect=True)
@pytest.mark.parametrize("lengths", [[63], [1], UNEVEN], ids=str)
@pytest.mark.parametrize(("num_channels", "num_states"), [(64, 16), (1536 + 16, 16), (97, 5), (33, 64)])
def test_every_tiling_of_the_scan(lengths: list[int], num_channels: int, num_states: int) -> None:
    check_scan(make_scan(lengths, num_channels, num_states, torch.bfloat16, "cuda"), TOLERANCE[torch.bfloat16])
    check_scan(make_scan(lengths, num_channels, num_states, device="cuda"), TOLERANCE[torch.float32])
    narrow = make_scan(lengths, num_channels, num_states, device="cuda", state_dtype=torch.bfloat16)
    check_scan(narrow, TOLERANCE[torch.float32], state_tolerance=4e-3)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("tiling", TILINGS, ids=str, indirect=True)
@pytest.mark.parametrize(("num_channels", "num_states"), [(64, 16), (97, 5)])
def test_gradients_of_every_tiling(num_channels: int, num_states: int) -> None:
    test_scan_gradients(UNEVEN, num_channels, num_states, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[63], [500], [1], UNEVEN], ids=str)
@pytest.mark.parametrize(("num_channels", "width"), [(64, 4), (1536 + 16, 4), (97, 5), (1536, 2)])
def test_conv(lengths: list[int], num_channels: int, width: int, dtype: torch.dtype) -> None:
    case = make_conv(lengths, num_channels, width, dtype, "cuda")
    state, expected_state = case.state.clone(), case.state.float()
    y = ops.causal_conv1d(case.x, case.weight, case.bias, state, case.packing)
    expected = case.in_float32().run(reference, expected_state)
    assert error_ratio(y, expected) < TOLERANCE[dtype]
    assert torch.equal(state, expected_state.to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_channels", [64, 1536 + 16, 97])
def test_steps(num_channels: int, dtype: torch.dtype) -> None:
    case = make_scan([1] * 7, num_channels, 16, dtype, "cuda")
    state, expected_state = case.state.clone(), case.state.clone()
    y = ops.selective_scan_step(**case.inputs, state=state, slots=case.packing.slots)
    assert error_ratio(y, case.in_float32().run(reference, expected_state)) < TOLERANCE[dtype]
    assert error_ratio(state, expected_state) < 1e-6
    others = untouched(case.packing)
    assert torch.equal(state[others], case.state[others])
    conv = make_conv([1] * 7, num_channels, 4, dtype, "cuda")
    state, expected_state = conv.state.clone(), conv.state.float()
    y = ops.causal_conv1d_step(conv.x, conv.weight, conv.bias, state, conv.packing.slots)
    assert error_ratio(y, conv.in_float32().run(reference, expected_state)) < TOLERANCE[dtype]
    assert torch.equal(state, expected_state.to(dtype))


def scan_gradients(case: ScanCase, module: object) -> dict[str, Tensor]:
    y = module.selective_scan(**case.inputs, state=case.state.clone(), packing=case.packing)  # type: ignore[attr-defined]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to("cuda", torch.bfloat16)
    y.backward(dy.to(y.dtype))
    return {name: t.grad for name, t in case.inputs.items() if t.grad is not None}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("lengths", "num_channels", "num_states"), [(UNEVEN, 768 + 16, 16), ([700], 97, 5), ([33] * 8, 64, 16)]
)
def test_scan_gradients(lengths: list[int], num_channels: int, num_states: int, dtype: torch.dtype) -> None:
    case = make_scan(lengths, num_channels, num_states, dtype, "cuda")
    actual = scan_gradients(case.with_grad(), ops)
    expected = scan_gradients(case.in_float32().with_grad(), reference)
    for name in SCAN_INPUTS:
        assert actual[name].dtype == case.inputs[name].dtype
        assert error_ratio(actual[name], expected[name]) < GRADIENT_TOLERANCE[dtype], name


def test_scan_gradients_are_deterministic() -> None:
    case = make_scan([300, 41, 7], 768, 16, torch.bfloat16, "cuda")
    first, second = (scan_gradients(case.with_grad(), ops) for _ in range(2))
    for name in SCAN_INPUTS:
        assert torch.equal(first[name], second[name]), name


def conv_gradients(case: ConvCase, module: object) -> list[Tensor]:
    assert case.bias is not None
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = module.causal_conv1d(*leaves, case.state.clone(), case.packing)  # type: ignore[attr-defined]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to("cuda", torch.bfloat16)
    y.backward(dy.to(y.dtype))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_channels", "width"), [(768 + 16, 4), (97, 5), (64, 2)])
def test_conv_gradients(num_channels: int, width: int, dtype: torch.dtype) -> None:
    case = make_conv(UNEVEN, num_channels, width, dtype, "cuda")
    actual, expected = conv_gradients(case, ops), conv_gradients(case.in_float32(), reference)
    for one, other in zip(actual, expected, strict=True):
        assert error_ratio(one, other) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [384, 2560, 97, 4096])
def test_norms_and_their_gradients(width: int, dtype: torch.dtype) -> None:
    found = []
    for module, cast in ((ops, dtype), (reference, torch.float32)):
        generator = torch.Generator().manual_seed(width)
        x = torch.randn(3001, width, generator=generator).to("cuda", dtype).to(cast).requires_grad_()
        residual = torch.randn(3001, width, generator=generator).cuda().requires_grad_()
        weight = torch.randn(width, generator=generator).to("cuda", dtype).to(cast).requires_grad_()
        y, total = module.rms_norm_residual(x, residual, weight, 1e-5)
        plain = module.rms_norm(x, None, 1e-5)
        seeds = [torch.randn(t.shape, generator=generator).cuda().bfloat16().to(t.dtype) for t in (y, total, plain)]
        torch.autograd.backward([y, total, plain], seeds)
        found.append([y, total, plain, x.grad, residual.grad, weight.grad])
    for actual, expected in zip(*found, strict=True):
        assert actual is not None
        assert expected is not None
        assert error_ratio(actual.detach(), expected.detach()) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("num_states", [8, 32, 64])
def test_other_state_sizes(num_states: int) -> None:
    case = make_scan([200, 31], 96, num_states, device="cuda")
    actual = scan_gradients(case.with_grad(), ops)
    expected = scan_gradients(case.with_grad(), reference)
    for name in SCAN_INPUTS:
        assert error_ratio(actual[name], expected[name]) < 1e-4, name


def test_a_long_sequence_in_segments_equals_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_scan([5000, 1234], 256, 16, device="cuda")
    states, outputs = [], []
    monkeypatch.setattr(triton_scan, "has_tiles", lambda *_: False)
    for enough in (1 << 30, 0):
        monkeypatch.setattr(triton_scan, "_ENOUGH_PROGRAMS", enough)
        states.append(case.state.clone())
        outputs.append(case.run(ops, states[-1]))
    assert error_ratio(outputs[0], outputs[1]) < 1e-5
    assert error_ratio(states[0], states[1]) < 1e-5


class TestBeyondTwoBillionElements:
    """Offsets that do not fit 32 bits: 2^31 is 2,147,483,648."""

    NUM_TOKENS, NUM_CHANNELS, TAIL = 1_400_001, 1536, 100

    @pytest.fixture(autouse=True)
    def enough_memory(self) -> None:
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GiB of GPU memory")

    def packing(self) -> Packing:
        """Two sequences, the second of which ends far beyond 2^31 elements."""
        first = self.NUM_TOKENS // 3
        return Packing.from_lengths([first, self.NUM_TOKENS - first], torch.tensor([2, 1], device="cuda"))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def test_conv(self) -> None:
        torch.manual_seed(0)
        x = self.random(self.NUM_TOKENS, self.NUM_CHANNELS)
        assert x.numel() > 2**31
        weight, bias = self.random(self.NUM_CHANNELS, 4), self.random(self.NUM_CHANNELS)
        state = self.random(3, self.NUM_CHANNELS, 3)
        y = ops.causal_conv1d(x, weight, bias, state, self.packing())
        tail = x[-self.TAIL - 3 :]
        # the window before the tail is the state the tail starts from
        tail_state = tail[:3].float().T[None].clone()
        packing = Packing.from_lengths([self.TAIL], torch.tensor([0], device="cuda"))
        expected = reference.causal_conv1d(tail[3:].float(), weight.float(), bias.float(), tail_state, packing)
        assert error_ratio(y[-self.TAIL :], expected) < 4e-3
        assert torch.equal(state[1], tail[-3:].T)

    def test_scan(self) -> None:
        torch.manual_seed(0)
        x = self.random(self.NUM_TOKENS, self.NUM_CHANNELS)
        dt = self.random(self.NUM_TOKENS, self.NUM_CHANNELS)
        bc = self.random(self.NUM_TOKENS, 32)
        A = -torch.arange(1, 17, device="cuda").float().repeat(self.NUM_CHANNELS, 1)
        D, dt_bias = self.random(self.NUM_CHANNELS), self.random(self.NUM_CHANNELS)

        def arguments(begin: int, end: int) -> dict[str, Tensor]:
            rows = slice(begin, end)
            per_token = {"x": x[rows], "dt": dt[rows], "z": x[rows], "B": bc[rows, :16], "C": bc[rows, 16:]}
            return per_token | {"A": A, "D": D, "dt_bias": dt_bias}

        state = torch.zeros(3, self.NUM_CHANNELS, 16, device="cuda")
        y = ops.selective_scan(**arguments(0, self.NUM_TOKENS), state=state, packing=self.packing())
        # the state before the tail, reached with small offsets: from a little before, since A forgets quickly
        begin = self.NUM_TOKENS - self.TAIL - 2000
        tail_state = torch.zeros(1, self.NUM_CHANNELS, 16, device="cuda")
        slot = torch.tensor([0], device="cuda")
        lead, tail = Packing.from_lengths([2000], slot), Packing.from_lengths([self.TAIL], slot)
        ops.selective_scan(**arguments(begin, begin + 2000), state=tail_state, packing=lead)
        inputs = {name: t.float() for name, t in arguments(begin + 2000, self.NUM_TOKENS).items()}
        expected = reference.selective_scan(**inputs, state=tail_state, packing=tail)
        assert error_ratio(y[-self.TAIL :], expected) < 4e-3
        assert error_ratio(state[1], tail_state[0]) < 1e-4

    def test_norms(self) -> None:
        torch.manual_seed(0)
        x = self.random(self.NUM_TOKENS, self.NUM_CHANNELS)
        weight = self.random(self.NUM_CHANNELS)
        tail = x[-self.TAIL :].clone()
        y = ops.rms_norm(x, weight, 1e-5)
        assert error_ratio(y[-self.TAIL :], reference.rms_norm(tail.float(), weight.float(), 1e-5)) < 4e-3
        del y
        y, total = ops.rms_norm_residual(x, x, weight, 1e-5)
        expected, expected_total = reference.rms_norm_residual(tail, tail, weight, 1e-5)
        assert error_ratio(y[-self.TAIL :], expected) < 4e-3
        assert torch.equal(total[-self.TAIL :], expected_total)

    def test_pools_of_states(self) -> None:
        num_slots = 90_000
        state = torch.zeros(num_slots, self.NUM_CHANNELS, 16, device="cuda")
        assert state.numel() > 2**31
        far = torch.tensor([num_slots - 1, 3, num_slots - 2], device="cuda")
        case = make_scan([1] * 3, self.NUM_CHANNELS, 16, device="cuda")
        near_state = torch.zeros(3, self.NUM_CHANNELS, 16, device="cuda")
        y = ops.selective_scan_step(**case.inputs, state=state, slots=far)
        expected = reference.selective_scan_step(**case.inputs, state=near_state, slots=torch.arange(3, device="cuda"))
        assert error_ratio(y, expected) < 1e-5
        assert error_ratio(state[far], near_state) < 1e-6
        state[far] = 0
        assert not state.any()

    def test_pools_of_windows(self) -> None:
        num_slots = 500_000
        state = torch.zeros(num_slots, self.NUM_CHANNELS, 3, device="cuda", dtype=torch.bfloat16)
        assert state.numel() > 2**31
        far = torch.tensor([num_slots - 1, 3, num_slots - 2], device="cuda")
        case = make_conv([1] * 3, self.NUM_CHANNELS, 4, torch.bfloat16, "cuda")
        near_state = torch.zeros(3, self.NUM_CHANNELS, 3, device="cuda", dtype=torch.bfloat16)
        near = torch.arange(3, device="cuda")
        y = ops.causal_conv1d_step(case.x, case.weight, case.bias, state, far)
        expected = reference.causal_conv1d_step(case.x, case.weight, case.bias, near_state, near)
        assert error_ratio(y, expected) < 4e-3
        assert torch.equal(state[far], near_state)
        state[far] = 0
        assert not state.any()


def test_steps_replay_in_a_graph() -> None:
    case = make_scan([1] * 5, 1536, 16, torch.bfloat16, "cuda")
    conv = make_conv([1] * 5, 1536, 4, torch.bfloat16, "cuda")
    slots = case.packing.slots
    ssm_state, conv_state = case.state.clone(), conv.state.clone()

    def step() -> tuple[Tensor, Tensor]:
        x = ops.causal_conv1d_step(conv.x, conv.weight, conv.bias, conv_state, slots)
        return x, ops.selective_scan_step(**(case.inputs | {"x": x}), state=ssm_state, slots=slots)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    results = []
    for run in (step, lambda: (graph.replay(), replayed)[1]):
        ssm_state.copy_(case.state)
        conv_state.copy_(conv.state)
        outputs = run()
        torch.cuda.synchronize()
        results.append([t.clone() for t in (*outputs, ssm_state, conv_state)])
    for eager, graphed in zip(*results, strict=True):
        assert torch.equal(eager, graphed)
