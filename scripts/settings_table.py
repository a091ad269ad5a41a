"""Writes the table of settings in README.md from the settings themselves: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app.cli import shown_default
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- settings, written by `make docs` -->\n", "<!-- end of settings -->\n"


def render(fields: dict[str, FieldInfo]) -> str:
    """A Markdown table with one row per setting, under the groups that ``--help`` shows."""
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    group = None
    for name, field in fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if extra["group"] != group:
            group = extra["group"]
            lines.append(f"| **{group}** | | |")
        description = (field.description or "").replace("|", "\\|")
        lines.append(f"| `--{name.replace('_', '-')}` | {_default(field)} | {description} |")
    return "\n".join(lines) + "\n"


def replace_table(readme: str, table: str) -> str:
    """The text with what stands between the two marks replaced. Raises ValueError when a mark is missing."""
    before, after = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return readme[:before] + table + readme[after:]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default in (None, (), ""):
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"`{shown_default(field)}`"


def main() -> int:
    README.write_text(
        replace_table(README.read_text(encoding="utf-8"), render(Settings.model_fields)), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
