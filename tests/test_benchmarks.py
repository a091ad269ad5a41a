"""The benchmarks run, print what they promise, and compare with a floor that is computed rightly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode, in_process, memory, prefill
from benchmarks.in_process import Subject, random_model
from benchmarks.machine import Machine, measure_machine

H200 = Machine("H200", copy_bytes_per_s=4.28e12, read_bytes_per_s=4.0e12, product_flops_per_s=780e12)


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "measure_machine", lambda *_: H200)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("known_machine")
def test_decode_prints_a_line_per_batch(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main(["--random", "tiny", "--device", "cpu", "--batch", "1,3", "--tokens", "4", "--prompt", "5"])
    machine, *cases = lines(capsys)
    assert machine["copy_gb_per_s"] == 4280
    assert [(case["batch"], case["steps"]) for case in cases] == [(1, 4), (3, 4)]
    for case in cases:
        assert case["tokens_per_s"] == pytest.approx(1e3 * case["batch"] / case["ms_mean"], rel=0.01)
        assert case["ms_per_step"] > case["floor_ms"]
        assert {"python", "torch"} <= set(case["versions"])


@pytest.mark.usefixtures("known_machine")
def test_prefill_prints_a_line_per_shape(capsys: pytest.CaptureFixture[str]) -> None:
    prefill.main(["--random", "tiny", "--device", "cpu", "--shape", "1x40,3x7", "--repeats", "2"])
    _, *cases = lines(capsys)
    assert [case["shape"] for case in cases] == ["1x40", "3x7"]
    assert cases[1]["tokens_per_s"] == pytest.approx(21e3 / cases[1]["ms"], rel=0.01)


@pytest.mark.parametrize(("rows", "milliseconds"), [(1, 1.30), (64, 1.98), (256, 4.03)])
def test_floor_of_a_decode_step(rows: int, milliseconds: float) -> None:
    # 2.77 billion bf16 weights once, and 22 MiB of fp32 state per row read and written, at 4.28 TB/s
    device, dtype = torch.device("meta"), torch.bfloat16
    subject = Subject("2.8b", random_model("2.8b", device, dtype), device, dtype, torch.float32, H200)
    assert 1e3 * subject.floor_seconds(rows, rows) == pytest.approx(milliseconds, rel=0.01)


def test_floor_of_a_long_prompt_is_its_products() -> None:
    # 2.6 billion multiplications a token, at 780 TFLOP/s
    device, dtype = torch.device("meta"), torch.bfloat16
    subject = Subject("2.8b", random_model("2.8b", device, dtype), device, dtype, torch.float32, H200)
    assert 8192 / subject.floor_seconds(8192, 1) == pytest.approx(147_000, rel=0.02)


def test_rates_of_this_machine_are_finite_and_plausible() -> None:
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.copy_bytes_per_s < 1e13
    assert 1e8 < machine.product_flops_per_s < 1e14


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from Linux")
def test_memory_tells_the_peaks_of_both_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(__file__).parents[1] / "models" / "mamba-python-15m"
    monkeypatch.setattr(memory, "CASES", (memory.Case("small", 600, 3),))
    memory.main(["--model", str(model), "--device", "cpu", "--server-args", "--num-threads", "1"])
    (line,) = lines(capsys)
    assert (line["prompt_tokens"], line["output_tokens"]) == (600, 3)
    assert set(line["peak_rss_mib"]) == {"api", "engine"}
    # the engine holds torch, the other process does not
    assert line["peak_rss_mib"]["engine"] > 2 * line["peak_rss_mib"]["api"] > 50
    assert line["peak_rss_mib"]["engine"] >= line["ready_peak_rss_mib"]["engine"]
