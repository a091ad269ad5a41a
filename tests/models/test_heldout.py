"""Held-out files are found again in wheels and folders, and only with the text that was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from models.recipe.corpus import Documents, normalised_digest
from models.recipe.heldout import main, rebuild, requirements

FIRST = "def first(value):\n    return value + 1\n" * 10
SECOND = "def second(value):\n    return value + 2\n" * 10
LIBRARY = "def library(value):\n    return value + 3\n" * 10


def summary_of(texts: dict[tuple[str, str], str]) -> dict[str, Any]:
    return {
        "included": [{"package": "Beta", "version": "2.0"}, {"package": "alpha", "version": "1.0"}],
        "heldout_files": [
            {"package": package, "path": path, "sha256": normalised_digest(text), "bytes": len(text)}
            for (package, path), text in texts.items()
        ],
    }


SUMMARY = summary_of(
    {
        ("alpha", "alpha/first.py"): FIRST,
        ("Beta", "beta/second.py"): SECOND,
        ("python-standard-library", "library.py"): LIBRARY,
    }
)


def write_wheel(folder: Path, members: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    with ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return folder


def write_library(folder: Path, text: str = LIBRARY) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "library.py").write_bytes(text.encode())
    return folder


def test_the_distributions_to_fetch_are_named_with_their_versions() -> None:
    assert requirements(SUMMARY) == ["alpha==1.0", "Beta==2.0"]


def test_files_are_found_in_wheels_and_folders_and_keep_their_order(tmp_path: Path) -> None:
    wheels = write_wheel(
        tmp_path / "wheels",
        {
            "beta-2.0.data/purelib/beta/second.py": SECOND,
            "alpha/first.py": FIRST.replace("\n", "\r\n"),
            "other.py": "x",
        },
    )
    library = write_library(tmp_path / "library")

    assert rebuild(SUMMARY, [wheels, library], tmp_path / "corpus") == []

    documents = Documents(tmp_path / "corpus", "heldout")
    assert documents.take(range(len(documents))) == [FIRST, SECOND, LIBRARY]


@pytest.mark.parametrize("text", [LIBRARY.replace("3", "4"), LIBRARY.replace("    ", "\t"), "x = 1\n"])
def test_a_file_with_another_text_is_not_taken(tmp_path: Path, text: str) -> None:
    wheels = write_wheel(tmp_path / "wheels", {"alpha/first.py": FIRST, "beta/second.py": SECOND})
    library = write_library(tmp_path / "library", text)

    missing = rebuild(SUMMARY, [wheels, library], tmp_path / "corpus")

    assert [entry["path"] for entry in missing] == ["library.py"]
    assert len(Documents(tmp_path / "corpus", "heldout")) == 2


def test_a_later_source_makes_up_for_another_version_in_an_earlier_one(tmp_path: Path) -> None:
    old = write_library(tmp_path / "old", LIBRARY.replace("3", "4"))
    right = write_library(tmp_path / "right")

    missing = rebuild(SUMMARY, [old, right], tmp_path / "corpus")

    assert [entry["path"] for entry in missing] == ["alpha/first.py", "beta/second.py"]


def test_the_command_tells_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(SUMMARY))
    library = write_library(tmp_path / "library")

    assert main([str(data), "--list"]) == 0
    assert capsys.readouterr().out.split() == ["alpha==1.0", "Beta==2.0"]
    assert main([str(data), "--corpus", str(tmp_path / "corpus"), "--source", str(library)]) == 1
    printed = capsys.readouterr().out
    assert "1 of 3 held-out files" in printed
    assert "missing: 1 of Beta" in printed


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        rebuild(SUMMARY, [tmp_path / "nothing"], tmp_path / "corpus")
