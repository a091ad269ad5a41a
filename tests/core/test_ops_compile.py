"""Every kernel compiles for the GPU it is meant for, on any machine, and none is tuned at run time."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from mamba_core.ops.triton import (
    conv_backward_kernels,
    conv_kernels,
    norm_kernels,
    quantized_kernels,
    scan_backward_kernels,
    scan_kernels,
    scan_tile_kernels,
    step_lag_kernels,
)
from tests.compiling import records_of

ROOT = Path(__file__).parents[2]
MODULES = (
    conv_backward_kernels,
    conv_kernels,
    norm_kernels,
    quantized_kernels,
    scan_backward_kernels,
    scan_kernels,
    scan_tile_kernels,
    step_lag_kernels,
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record per kernel, from a process that compiles where this one interprets."""
    return records_of("tests.core.compile_kernels", tmp_path_factory.mktemp("triton"))


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    written = {name for module in MODULES for name, _ in inspect.getmembers(module) if name.endswith("_kernel")}
    assert {record["kernel"] for record in compiled} == written
    assert all(record["cubin_bytes"] > 0 for record in compiled)


def test_no_kernel_is_tuned_at_run_time(compiled: list[dict[str, Any]]) -> None:
    # a trial run of a kernel that writes state would advance the state
    assert {record["type"] for record in compiled} == {"JITFunction", "GluonJITFunction"}


def test_states_of_a_channel_lie_in_one_thread(compiled: list[dict[str, Any]]) -> None:
    # the layout that ``tiles`` promises: no exchange between threads in the forward scan
    scans = [record for record in compiled if record["kernel"] in ("scan_kernel", "scan_segment_kernel")]
    assert [(record["shuffles"], record["shared_bytes"]) for record in scans] == [(0, 0)] * 3


def test_a_step_of_a_convolution_moves_16_bytes_a_thread(compiled: list[dict[str, Any]]) -> None:
    by_taps = next(record for record in compiled if record["kernel"] == "conv_step_kernel")
    # an input and the three kept, and as many written
    assert (by_taps["wide_accesses"], by_taps["narrow_accesses"]) == (8, 0)


def test_no_length_is_compiled_for(compiled: list[dict[str, Any]]) -> None:
    varying = {"num_tokens", "num_rows", "num_segments", "segment_size", "slots_ptr"}
    assert not [(record["kernel"], name) for record in compiled for name in varying & set(record["specialised"])]
