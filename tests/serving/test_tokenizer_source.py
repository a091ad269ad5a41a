"""A directory, or the tokenizer files of a hub id."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from app.serving.tokenizer import TokenizerError
from app.serving.tokenizer_source import find_tokenizer


def test_a_directory_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    assert find_tokenizer(str(tmp_path)) == tmp_path


def test_of_a_hub_id_only_the_tokenizer_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "someone/tokenizer"
        assert "tokenizer.json" in allow_patterns
        assert not any("safetensors" in pattern or "bin" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_tokenizer("someone/tokenizer") == tmp_path


def test_what_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:  # noqa: ARG001 (the hub's signature)
        raise ConnectionError("a long story\nof sockets")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(TokenizerError, match=r"--tokenizer 'someone/none' .*\(ConnectionError\)$"):
        find_tokenizer("someone/none")
