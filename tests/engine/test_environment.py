"""What an engine process is told by its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import app
from app.engine.early import environment


def test_the_child_finds_the_same_app(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import app; print(app.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, env=environment(), check=True, capture_output=True, text=True)
    assert found.stdout.strip() == app.__file__


def test_threads_give_cores_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert 0 < int(environment()["GOMP_SPINCOUNT"]) < 100_000


@pytest.fixture
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_nothing_is_set")
def test_few_products_stay_compiled() -> None:
    given = environment()
    assert {given[name] for name in NAMES if name.endswith("_CAPACITY")} == {"64"}


NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
OURS = {"PYTHONPATH", "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}


@pytest.mark.usefixtures("_nothing_is_set")
@pytest.mark.parametrize("name", NAMES)
def test_the_operator_decides(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value = "active" if name == "OMP_WAIT_POLICY" else "7"
    monkeypatch.setenv(name, value)
    changed = {key for key, found in environment().items() if os.environ.get(key) != found}
    assert changed == OURS - {name, "GOMP_SPINCOUNT" if name == "OMP_WAIT_POLICY" else name}
    assert environment()[name] == value
