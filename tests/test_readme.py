"""What README.md states about flags and routes is what the program has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.api.app import document
from app.cli import build_parser
from app.settings import Settings
from scripts.settings_table import BEGIN, END, README, render, replace_table

ROOT = Path(__file__).parents[1]
TEXTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "deploy" / "README.md",
    ROOT / "docs" / "LIMITS.md",
    ROOT / "docs" / "API.md",
    ROOT / "docs" / "METRICS.md",
]
# flags of other programs
FOREIGN = {
    "--build-arg",
    "--read-only",
    "--tmpfs",
    "--gpus",
    "--rm",
    "--random",
    "--check",
    "--url",
    "--threads",
    "--batch",
    "--shape",
    "--from-file",
}


def test_settings_table_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    table = render(Settings.model_fields)
    assert replace_table(text, table) == text, "run `make docs`"
    assert table.count("| `--") == len(Settings.model_fields)


def test_a_missing_mark_is_an_error() -> None:
    with pytest.raises(ValueError, match="substring not found"):
        replace_table(BEGIN, "")
    assert replace_table(BEGIN + "old\n" + END, "new\n") == BEGIN + "new\n" + END


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_named_in_prose_exist(path: Path) -> None:
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8")))
    assert named - known - FOREIGN == set()


def test_the_table_of_routes_is_complete() -> None:
    served = {
        f"{method.upper()} {re.sub(r'{.*}', '{id}', path)}"
        for path, methods in document()["paths"].items()
        for method in methods
    }
    assert len(served) > 5
    table = README.read_text(encoding="utf-8").split("## The API")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", table))
    assert named == served | {"GET /docs", "GET /openapi.json"}


def test_links_lead_somewhere() -> None:
    for path in TEXTS:
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
        assert [link for link in links if not (path.parent / link).exists()] == []
