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


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")])
def test_the_operator_decides(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for other in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    changed = {key: found for key, found in environment().items() if os.environ.get(key) != found}
    assert set(changed) == {"PYTHONPATH"}
    assert environment()[name] == value
