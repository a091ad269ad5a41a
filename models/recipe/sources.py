"""Which Python files of this machine may be learnt from: distributions by licence, and the standard library."""

from __future__ import annotations

import importlib.metadata
import platform
import sysconfig
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from models.recipe.licences import judge_distribution

STANDARD_LIBRARY = "python-standard-library"

# copies of other projects: their licences are not those of the distribution that carries them
_VENDORED_FOLDERS = frozenset(
    {"_vendor", "vendor", "_vendored", "vendored", "_vendored_packages", "third_party", "_third_party", "thirdparty",
     "externals", "external", "_externals", "extern", "_extern", "site-packages", "dist-packages", "__pycache__"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: where it lies here, and its path inside its distribution."""

    path: Path
    relative_path: str


@dataclass(frozen=True, slots=True)
class Source:
    """One distribution with the ``.py`` files that its RECORD names."""

    package: str
    version: str
    licence: str
    files: tuple[SourceFile, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A distribution that was left out, and why."""

    package: str
    version: str
    reason: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def is_vendored(relative_path: str) -> bool:
    """Whether a path runs through a folder that holds copies of other projects."""
    return not _VENDORED_FOLDERS.isdisjoint(PurePosixPath(relative_path).parts)


def standard_library() -> Source:
    """The running interpreter's library, without anything installed into it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"))
    relative = ((path, path.relative_to(root).as_posix()) for path in paths)
    files = tuple(SourceFile(path, name) for path, name in relative if not is_vendored(name))
    return Source(STANDARD_LIBRARY, platform.python_version(), "PSF-2.0", files)


def find_sources(only: Collection[str] = ()) -> tuple[list[Source], list[Exclusion]]:
    """Every permissively licensed distribution on ``sys.path`` and the standard library, and what was left out.

    ``only`` names the distributions to consider (all if empty). A file claimed by two belongs to the first.
    """
    sources: list[Source] = []
    exclusions: list[Exclusion] = []
    claimed: set[Path] = set()
    for distribution in _distributions(only):
        found = _judge(distribution, claimed)
        if isinstance(found, Exclusion):
            exclusions.append(found)
        else:
            sources.append(found)
            claimed.update(file.path for file in found.files)
    if not only or STANDARD_LIBRARY in only:
        sources.append(standard_library())
    return sources, exclusions


def _distributions(only: Collection[str]) -> Iterable[importlib.metadata.Distribution]:
    unique: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        if not (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")):
            continue
        name = distribution.metadata["Name"]
        if name and (not only or name.lower() in only):
            unique.setdefault(name.lower(), distribution)
    return [unique[name] for name in sorted(unique)]


def _judge(distribution: importlib.metadata.Distribution, claimed: set[Path]) -> Source | Exclusion:
    name, version = distribution.metadata["Name"], distribution.version
    verdict = judge_distribution(distribution.metadata)  # type: ignore[arg-type]  # a Message at run time
    if not verdict.is_permissive:
        return Exclusion(name, version, verdict.reason)
    if distribution.files is None:
        return Exclusion(name, version, "no list of installed files")
    files = tuple(file for file in _python_files(distribution) if file.path not in claimed)
    if not files:
        return Exclusion(name, version, "no Python source files")
    return Source(name, version, verdict.licence, files)


def _python_files(distribution: importlib.metadata.Distribution) -> list[SourceFile]:
    files = []
    for entry in distribution.files or []:
        relative = entry.as_posix()
        if entry.suffix == ".py" and not is_vendored(relative) and ".." not in entry.parts:
            files.append(SourceFile(Path(str(distribution.locate_file(entry))), relative))
    return sorted(files, key=lambda file: file.relative_path)
