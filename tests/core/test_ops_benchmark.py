"""The benchmark of the ops runs every case, and its floors are the bytes and exponentials of the op."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ops as benchmark


def test_every_op_is_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SCAN_SHAPES", {"cpu": [(1, 16, 64), (2, 8, 64), (1, 32, 64)]})
    monkeypatch.setattr(benchmark, "TRAINING_SHAPES", {"cpu": [(2, 8, 64)]})
    monkeypatch.setattr(benchmark, "STEP_SHAPES", {"cpu": [(2, 64)]})
    benchmark.main(["--device", "cpu", "--repeats", "2"])
    machine, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert machine["copy_gb_per_s"] > 0
    assert machine["exponentials_per_ns"] > 0
    assert [line["op"] for line in lines].count("selective_scan") == 4
    assert {line["op"] for line in lines} == {
        "causal_conv1d",
        "causal_conv1d backward",
        "causal_conv1d_step",
        "rms_norm_residual",
        "selective_scan",
        "selective_scan backward",
        "selective_scan_step",
    }
    assert all(line["ms"] > 0 for line in lines)


def test_floor_of_a_scan_on_an_h200_is_its_exponentials() -> None:
    make = benchmark.Maker(torch.device("cpu"), torch.bfloat16)
    case = benchmark.scan_case(make, 8, 2048, 5120)
    assert case.num_exponentials == 8 * 2048 * 5120 * 16
    rates = benchmark.Rates(4.28e12, 4.18e12)
    line = benchmark.result(case, 1.448e-3, rates, make)
    assert line["floor_ms"] == pytest.approx(0.321, rel=0.01)
    assert line["exponentials_per_ns"] == pytest.approx(927, rel=0.01)


def test_floor_of_a_step_is_its_states() -> None:
    make = benchmark.Maker(torch.device("cpu"), torch.bfloat16)
    case = benchmark.scan_step_case(make, 256, 5120)
    states = 2 * 256 * 5120 * 16 * 4
    assert states < case.num_bytes < 1.1 * states
