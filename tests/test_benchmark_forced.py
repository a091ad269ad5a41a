"""The comparison of forced tokens at once with one by one prints what it promises, and draws the same both ways."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from app.engine.forced import STEPS_PER_CHUNK
from benchmarks import forced, in_process
from benchmarks.machine import Machine

TOKENIZER = Path(__file__).parents[1] / "models" / "mamba-python-15m"


def test_both_ways_are_told_side_by_side(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("a CPU", copy_bytes_per_s=1e10, read_bytes_per_s=1e10, product_flops_per_s=1e11)
    monkeypatch.setattr(in_process, "measure_machine", lambda *_: machine)
    arguments = ["--rows", "1,3", "--beside", "1", "--rounds", "1", "--case", "short names", "--case", "choice"]
    forced.main(["--random", "tiny", "--device", "cpu", "--tokenizer", str(TOKENIZER), *arguments])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cases = [line for line in lines if line.get("benchmark") == "forced"]
    assert [(case["case"], case["requests"]) for case in cases] == [
        (name, rows) for name in ("short names", "choice") for rows in (1, 3)
    ]
    for case in cases:
        # of weights in fp32, next to nothing is rounded otherwise
        assert case["equal"] == case["requests"]
        assert 0 < case["at_once"]["steps"] < case["one_by_one"]["steps"]
        assert case["at_once"]["tokens_per_s"] > 0
        assert case["one_by_one"]["latency_ms"] > 0
    assert math.isfinite(STEPS_PER_CHUNK["cpu"])
