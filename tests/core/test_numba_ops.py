"""What the compiled CPU ops do beside computing: threads, dtypes, rounding, and where their machine code is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mamba_core import ops
from mamba_core.ops import Packing, cpu, numba_ops
from mamba_core.ops.numba_ops import team
from mamba_core.ops.numba_ops.quantized import dequantize
from tests.core.ops_cases import error_ratio, make_conv, make_scan, poison_memory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("has_openmp", [True, False])
@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_work(monkeypatch: pytest.MonkeyPatch, has_openmp: bool) -> None:
    poison_memory(monkeypatch)
    if not has_openmp:
        monkeypatch.setattr(team, "find_openmp", lambda: None)
    scan, conv = make_scan([33, 0, 70], 500, 16), make_conv([33, 0, 70], 500, 4)
    states = [scan.state.clone(), scan.state.clone(), conv.state.clone(), conv.state.clone()]
    assert error_ratio(scan.run(numba_ops, states[0]), scan.run(cpu, states[1])) < 1e-6
    assert error_ratio(states[0], states[1]) < 1e-6
    assert error_ratio(conv.run(numba_ops, states[2]), conv.run(cpu, states[3])) < 1e-6
    assert torch.equal(states[2], states[3])
    x = torch.randn(1000, 100)
    assert error_ratio(numba_ops.rms_norm(x, None, 1e-5), cpu.rms_norm(x, None, 1e-5)) < 1e-6


def norm_of_sums(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return numba_ops.rms_norm_residual(x, residual, torch.ones(x.shape[1]), 1e-5)


def test_bfloat16_is_rounded_as_torch_does() -> None:
    # every upper half of an fp32 number, with lower halves on both sides of a tie and on it
    upper = torch.arange(1 << 16, dtype=torch.int64)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        numbers = (upper << 16 | lower).to(torch.int32).view(torch.float32)[:, None].expand(-1, 3)
        _, total = norm_of_sums(numbers, torch.zeros(numbers.shape, dtype=torch.bfloat16))
        torch.testing.assert_close(total, numbers.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_beside_the_outputs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    # outputs are given as parts of larger tensors, whose other numbers must stay
    made: list[tuple[Tensor, Tensor]] = []

    def framed(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        whole = torch.full((shape[0] + 2, shape[1] + 40), 7, dtype=dtype)
        made.append((whole, whole[1:-1, 20:-20]))
        return made[-1][1]

    scan, conv = make_scan([5, 9], 97, 5, dtype), make_conv([5, 9], 97, 4, dtype)
    monkeypatch.setattr(torch, "empty", framed)
    scan.run(numba_ops, scan.state)
    conv.run(numba_ops, conv.state)
    numba_ops.rms_norm_residual(scan.inputs["x"], scan.inputs["dt"], scan.inputs["D"], 1e-5)
    assert len(made) == 4
    for whole, part in made:
        assert not (part == 7).any()
        part.fill_(7)
        assert (whole == 7).all()


def test_mixed_dtypes_and_turned_inputs() -> None:
    case = make_scan([6, 3], 40, 5, torch.bfloat16)
    mixed = case.inputs | {
        "dt": case.inputs["dt"].float(),
        "B": case.inputs["B"].to(torch.float16),
        "z": case.inputs["z"].T.contiguous().T,
    }
    y = numba_ops.selective_scan(**mixed, state=case.state.clone(), packing=case.packing)
    expected = cpu.selective_scan(**mixed, state=case.state.clone(), packing=case.packing)
    assert y.dtype == torch.bfloat16
    assert error_ratio(y, expected) < 4e-3


@pytest.mark.parametrize("name", ["dt", "B", "C", "D", "z", "dt_bias", "x"])
def test_inputs_of_the_wrong_size_are_refused(name: str) -> None:
    case = make_scan([6, 3], 40, 5)
    case.inputs[name] = case.inputs[name][:-1]
    with pytest.raises((ValueError, IndexError)):
        case.run(numba_ops, case.state)


@pytest.mark.parametrize("slots", [[0, 9], [-1, 3]])
def test_slots_that_are_not_there_are_refused(slots: list[int]) -> None:
    packing = Packing.from_lengths([6, 3], torch.tensor(slots))
    for case in (make_scan([6, 3], 40, 5), make_conv([6, 3], 40, 4)):
        with pytest.raises(IndexError, match="slots"):
            replace(case, packing=packing).run(numba_ops, case.state)


def test_tokens_that_are_not_there_are_refused() -> None:
    packing = Packing.from_lengths([6, 4], torch.tensor([1, 2]))
    for case in (make_scan([6, 3], 40, 5), make_conv([6, 3], 40, 4)):
        with pytest.raises(IndexError, match="10 in 9 tokens"):
            replace(case, packing=packing).run(numba_ops, case.state)


def test_rows_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scan, conv = make_scan([6, 3], 40, 5), make_conv([6, 3], 40, 4)
    scan.run(numba_ops, scan.state)
    monkeypatch.setattr(Tensor, "tolist", lambda _: pytest.fail("every layer would wait for this"))
    scan.run(numba_ops, scan.state)
    replace(conv, packing=scan.packing).run(numba_ops, conv.state)
    with pytest.raises(pytest.fail.Exception):
        conv.run(numba_ops, conv.state)


def test_rows_that_are_no_vectors_are_refused() -> None:
    case = make_scan([6, 3], 40, 5)
    packing = replace(case.packing, slots=case.packing.slots[:1])
    with pytest.raises(ValueError, match=r"\(1,\) and \(3,\)"):
        replace(case, packing=packing).run(numba_ops, case.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_outputs", "length"), [(1, 1), (3, 31), (130, 16), (70, 1537), (0, 5)])
@pytest.mark.usefixtures("three_threads")
def test_int8_becomes_what_it_stands_for(
    monkeypatch: pytest.MonkeyPatch, num_outputs: int, length: int, dtype: torch.dtype
) -> None:
    weight = torch.randint(-127, 128, (num_outputs, length), dtype=torch.int8)
    scales = torch.rand(num_outputs)
    expected = (weight.float() * scales[:, None]).to(dtype)
    poison_memory(monkeypatch)
    assert torch.equal(dequantize(weight, scales, dtype), expected)
    turned = weight.T.contiguous().T
    assert torch.equal(
        dequantize(turned, scales.bfloat16(), dtype), dequantize(weight, scales.bfloat16().float(), dtype)
    )


def test_only_int8_is_dequantized() -> None:
    weight, scales = torch.zeros(3, 4, dtype=torch.int8), torch.ones(3)
    for wrong in (
        (weight.short(), scales, torch.float32),
        (weight, scales, torch.float16),
        (weight, scales[:2], torch.float32),
    ):
        with pytest.raises(ValueError, match=r"int8|scales"):
            dequantize(*wrong)


def test_whoever_learns_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(8))
    x = torch.randn(3, 8)
    for name in ("rms_norm", "rms_norm_residual"):
        monkeypatch.setattr(numba_ops, name, lambda *_: pytest.fail("no gradient could flow through this"))
    ops.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None
    ops.rms_norm(x.to(torch.float16), None, 1e-5)
    with torch.no_grad(), pytest.raises(pytest.fail.Exception):
        ops.rms_norm(x, weight, 1e-5)


def compile_elsewhere(directory: Path, *lines: str) -> None:
    code = "\n".join(
        (
            *lines,
            "import torch",
            "from mamba_core.ops import numba_ops",
            "assert torch.equal(numba_ops.rms_norm(torch.ones(2, 5), None, 0.0), torch.ones(2, 5))",
        )
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(directory), "PYTHONWARNINGS": "error"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)


@pytest.mark.slow
def test_machine_code_is_kept_where_that_can_be(tmp_path: Path) -> None:
    compile_elsewhere(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert len(kept) == 3
    compile_elsewhere(tmp_path)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}


@pytest.mark.slow
def test_machine_code_need_not_be_kept(tmp_path: Path) -> None:
    # no place that numba knows of can be written to
    lines = [
        "from numba.core import caching",
        "kinds = [kind for kind in vars(caching).values() if hasattr(kind, '_locator_classes')]",
        "assert kinds",
        "for kind in kinds: kind._locator_classes = []",
    ]
    compile_elsewhere(tmp_path, *lines)
    assert not list(tmp_path.rglob("*.nbc"))
