"""A model's name becomes a directory: one that is here, or what the hub or its cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from mamba_core import checkpoints
from mamba_core.checkpoints import CheckpointError, CheckpointNotFound, HubUnavailable, hub


def test_a_directory_is_resolved_without_the_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", pytest.fail)
    monkeypatch.chdir(saved)
    assert checkpoints.resolve(str(saved)) == saved
    with pytest.raises(CheckpointNotFound, match="is a file"):
        checkpoints.resolve(str(saved / "config.json"))
    for name in ("./nowhere", "/no/where", "a/b/c", "", "../nowhere", "~nobody/x"):
        with pytest.raises(CheckpointNotFound, match="there is no directory"):
            checkpoints.resolve(name)


def test_pickles_are_fetched_only_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision, any("bin" in pattern for pattern in allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert checkpoints.resolve("someone/mamba", "v2") == tmp_path
    (tmp_path / "model.safetensors").touch()
    checkpoints.resolve("someone/mamba")
    assert asked == [("someone/mamba", "v2", False), ("someone/mamba", "v2", True), ("someone/mamba", None, False)]


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, CheckpointNotFound, "neither a directory here nor a model"),
        (huggingface_hub.errors.GatedRepoError, CheckpointNotFound, "is gated"),
        (huggingface_hub.errors.RevisionNotFoundError, CheckpointNotFound, "no revision 'v9'"),
        (huggingface_hub.errors.LocalEntryNotFoundError, HubUnavailable, "cannot be fetched"),
        (ConnectionError, HubUnavailable, "cannot be fetched"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(
    raised: type[Exception], error: type[CheckpointError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_args: Any, **_kwargs: Any) -> str:
        # the hub's own errors want a response to show
        raise raised.__new__(raised)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(error, match=message):
        checkpoints.resolve("someone/mamba", "v9")


def test_offline_the_cache_is_enough_and_its_absence_is_said_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--mamba" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    (snapshot / "model.safetensors").touch()
    assert checkpoints.resolve("someone/mamba") == snapshot
    with pytest.raises(HubUnavailable, match="^'someone/else' is no directory here and cannot be fetched"):
        checkpoints.resolve("someone/else")
