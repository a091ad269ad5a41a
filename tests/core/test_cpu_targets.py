"""Kernels of a CPU on CPUs that multiply nothing but fp32: run as compiled for x86, and as read for Arm."""

from __future__ import annotations

import platform
from pathlib import Path

import llvmlite.binding as llvm
import pytest
import torch

from mamba_core import cpu_step
from mamba_core.cpu_step import CpuStep
from mamba_core.ops import cpu, numba_ops
from mamba_core.ops.native.callbacks import step_callback
from mamba_core.ops.numba_ops import conv, norm, quantized, scan
from tests.compiling import records_of
from tests.core.cpu_targets import PLAIN_KINDS, Loaded, loaded_head, loaded_step, program_of
from tests.core.ops_cases import error_ratio, make_conv, make_scan, poison_memory
from tests.core.step_cases import SHAPES, MakeModel, check_int8_step, check_step

pytestmark = pytest.mark.slow

# each with an instruction by which it is known, and one that it has not
X86 = {"x86-64-v2": ("mulps\t%xmm", "ymm"), "haswell": ("%ymm", "zmm")}
TASKS = ((scan, "_scan_tasks"), (conv, "_conv_tasks"), (norm, "_norm_tasks"), (quantized, "_widen_tasks"))


@pytest.fixture(params=list(X86))
def cpu_name(request: pytest.FixtureRequest) -> str:
    features = llvm.get_host_cpu_features() if platform.machine() in ("x86_64", "AMD64") else {}
    if not all(features.get(name) for name in ("avx2", "fma", "bmi2")):
        pytest.skip("this machine does not run the code of an x86 CPU")
    return str(request.param)


@pytest.fixture
def compiled_for(cpu_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """All kernels compiled for a CPU, in the places of those for this one."""
    for module, name in TASKS:
        monkeypatch.setattr(module, name, Loaded.of(program_of(getattr(module, name)), cpu_name))
    monkeypatch.setattr(cpu_step, "step_callback", lambda kind: loaded_step(kind, cpu_name))
    monkeypatch.setattr(cpu_step, "head_callback", lambda kind: loaded_head(kind, cpu_name))
    return cpu_name


def test_code_for_a_cpu_is_of_its_instructions(cpu_name: str) -> None:
    its_own, too_new = X86[cpu_name]
    for callback in (*(getattr(module, name) for module, name in TASKS), step_callback(PLAIN_KINDS[1])):
        text = program_of(callback).assembly("x86_64-unknown-linux-gnu", cpu_name)
        assert its_own in text
        assert too_new not in text
        # what a CPU lacks would be such a function of one number
        assert not [line for line in text.splitlines() if "fmaf" in line or "truncsfbf" in line]


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_the_layers(tiny_model: MakeModel, dtype: torch.dtype) -> None:
    for family, changes in SHAPES:
        check_step(tiny_model, family, changes, dtype, CpuStep(may_use_pairs=False))


@pytest.mark.usefixtures("compiled_for")
def test_steps_with_int8_equal_what_it_stands_for(tiny_model: MakeModel) -> None:
    for family, changes in SHAPES:
        check_int8_step(tiny_model, family, changes, torch.bfloat16, CpuStep(may_use_pairs=False), False)


@pytest.mark.usefixtures("compiled_for")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_equal_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    poison_memory(monkeypatch)
    tolerance = 3e-6 if dtype == torch.float32 else 4e-3
    for num_channels, num_states in ((64, 16), (97, 5)):
        scans, convs = (
            make_scan([33, 0, 5], num_channels, num_states, dtype),
            make_conv([33, 0, 5], num_channels, 4, dtype),
        )
        for case in (scans, convs):
            state, expected = case.state.clone(), case.state.clone()
            assert error_ratio(case.run(numba_ops, state), case.run(cpu, expected)) < tolerance
            assert error_ratio(state, expected) < tolerance
        weight = torch.randint(-127, 128, (40, num_channels), dtype=torch.int8)
        scales = torch.rand(40)
        assert torch.equal(quantized.dequantize(weight, scales, dtype), (weight * scales[:, None]).to(dtype))
        x = torch.randn(20, num_channels).to(dtype)
        weight = torch.randn(num_channels)
        assert error_ratio(numba_ops.rms_norm(x, weight, 1e-5), cpu.rms_norm(x, weight, 1e-5)) < tolerance


def test_kernels_compile_for_arm(tmp_path: Path) -> None:
    records = records_of("tests.core.compile_cpu_kernels", tmp_path)
    assert len(records) == 2 * (len(TASKS) + 2 * len(PLAIN_KINDS))
    for record in records:
        assert record["of_another_machine"] == []
        assert record["vectors"] >= 4
        # nothing that the machine does by calling a function for each number
        assert set(record["calls"]) <= {"memcpy", "memset", "memmove", "bzero", "sched_yield"}
