"""The hint about weights names each file once, and nothing that is wrong with a checkpoint comes to light there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.engine.readahead import read_ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no such hints")


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        if "refused" in names[-1]:
            raise OSError

    monkeypatch.setattr(os, "posix_fadvise", note)
    return names


def test_every_shard_is_asked_for_once(advised: list[str], tmp_path: Path) -> None:
    for name in ("model-2.safetensors", "model-1.safetensors", "refused.safetensors", "old.bin", "config.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "absent.safetensors").symlink_to(tmp_path / "nowhere")
    before = len(os.listdir("/proc/self/fd"))
    thread = read_ahead(str(tmp_path))
    assert thread is not None
    thread.join()
    assert advised == ["model-1.safetensors", "model-2.safetensors", "refused.safetensors", "old.bin"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_directory_is_left_alone(advised: list[str], tmp_path: Path) -> None:
    assert read_ahead("state-spaces/mamba-130m-hf") is None
    assert read_ahead(str(tmp_path / "absent")) is None
    assert advised == []


def test_the_systems_own_hint_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10_000)
    thread = read_ahead(str(tmp_path))
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
