"""The number of slots follows from memory, within reason, and too little memory is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.engine import memory
from app.engine.memory import MAX_AUTO_SEQS, MemoryTooSmall, choose_max_num_seqs, free_memory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize(
    ("free", "slot", "fraction", "expected"),
    [
        (100 * MIB, 10 * MIB, 0.5, 4),
        (100 * MIB, 10 * MIB, 1.0, 9),
        (40 * MIB, 10 * MIB, 0.5, 1),
        (10**15, 10, 0.5, MAX_AUTO_SEQS["cpu"]),
    ],
)
def test_slots_fill_the_share_and_leave_one_for_scratch(
    monkeypatch: pytest.MonkeyPatch, free: int, slot: int, fraction: float, expected: int
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: free)
    assert choose_max_num_seqs(CPU, slot, fraction) == expected


def test_too_little_memory_is_told_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 30 * MIB)
    with pytest.raises(MemoryTooSmall, match=r"10\.0 MiB and 15 MiB .* memory_fraction"):
        choose_max_num_seqs(CPU, 10 * MIB, 0.5)


def test_free_memory_is_less_than_the_machine_has() -> None:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < free_memory(CPU) < int(fields["MemTotal"].split()[0]) * 1024


def test_freed_memory_is_kept() -> None:
    # a block that is freed and taken again costs page faults only if the system had it in between
    code = """
import resource, torch
from app.engine.memory import keep_freed_memory
def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(2**20) for _ in range(6)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert keep_freed_memory()
count_faults()
assert count_faults() < 500
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], env=environment)


@pytest.mark.parametrize(("limit", "used", "free"), [("1000", "400", 600), ("max", "400", None), ("300", "400", 0)])
def test_a_container_limit_counts(tmp_path: Path, limit: str, used: str, free: int | None) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert memory._cgroup_free(tmp_path) == free
    assert memory._cgroup_free(tmp_path / "nowhere") is None
