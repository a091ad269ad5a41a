"""How many threads an engine has when nobody says: what the machine's files tell is counted right."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine import cores
from app.engine.cores import usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight threads of the processor, two to a core."""
    monkeypatch.setattr(cores, "_allowed", lambda: list(range(8)))
    for number in range(8):
        directory = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / "sys/fs/cgroup" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_threads_of_one_core_count_once(machine: Path) -> None:
    assert usable_cores(machine) == 4


def test_cores_of_others_do_not_count(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: [1, 2, 5])
    assert usable_cores(machine) == 2


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 4), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_a_share_of_time_is_a_limit(machine: Path, limit: str, expected: int) -> None:
    write(machine, "cpu.max", limit)
    assert usable_cores(machine) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("300000", 3), ("10000", 1)])
def test_an_older_system_says_it_in_other_words(machine: Path, quota: str, expected: int) -> None:
    write(machine, "cpu/cpu.cfs_quota_us", quota)
    write(machine, "cpu/cpu.cfs_period_us", "100000\n")
    assert usable_cores(machine) == expected


def test_without_any_files_every_processor_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: [0, 3, 7])
    assert usable_cores(tmp_path) == 3
