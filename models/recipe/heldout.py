"""Rebuilds the held-out files of a published model: found by path, known by hash, whatever else the machine has.

``python -m models.recipe.heldout DATA --list`` names the distributions they come from, for ``pip download``;
``python -m models.recipe.heldout DATA --corpus FOLDER --source FOLDER ...`` looks for them in folders of wheels, in
``site-packages`` folders and in standard libraries, and writes what ``models.recipe.precision`` reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from models.recipe.corpus import Document, as_document, write_documents
from models.recipe.sources import STANDARD_LIBRARY

# what a wheel holds under these is installed beside everything else
_INSTALLED_FOLDERS = (".data/purelib/", ".data/platlib/")


def requirements(summary: dict[str, Any]) -> list[str]:
    """``name==version`` of every distribution that a held-out file comes from."""
    versions = {entry["package"]: entry["version"] for entry in summary["included"]}
    packages = {entry["package"] for entry in summary["heldout_files"]} - {STANDARD_LIBRARY}
    return [f"{package}=={versions[package]}" for package in sorted(packages, key=str.lower)]


def find_documents(summary: dict[str, Any], sources: Sequence[Path]) -> dict[str, Document]:
    """By their digests, the held-out files of ``data.json`` that the sources have with the same text."""
    wanted: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in summary["heldout_files"]:
        wanted[entry["path"]].append(entry)
    found: dict[str, Document] = {}
    for source in sources:
        for path, raw in _contents(source, wanted):
            for entry in wanted[path]:
                document = as_document(entry["package"], path, raw)
                # white space does not count in the digest, so that the length must agree as well
                if (
                    isinstance(document, Document)
                    and document.digest == entry["sha256"]
                    and len(document.text) == entry["bytes"]
                ):
                    found.setdefault(document.digest, document)
    return found


def _contents(source: Path, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """What a folder, or the wheels in it, hold at these paths."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder")
    for path in paths:
        if (source / path).is_file():
            yield path, (source / path).read_bytes()
    for wheel in sorted(source.glob("*.whl")):
        with ZipFile(wheel) as archive:
            for member in archive.namelist():
                installed = _installed_path(member)
                if installed in paths:
                    yield installed, archive.read(member)


def _installed_path(member: str) -> str:
    for folder in _INSTALLED_FOLDERS:
        if folder in member:
            return member.partition(folder)[2]
    return member


def rebuild(summary: dict[str, Any], sources: Sequence[Path], corpus: Path) -> list[dict[str, Any]]:
    """Write the held-out files that can be had, in their order, and return the entries of those that cannot."""
    found = find_documents(summary, sources)
    corpus.mkdir(parents=True, exist_ok=True)
    entries = summary["heldout_files"]
    texts = [found[entry["sha256"]].text for entry in entries if entry["sha256"] in found]
    write_documents(corpus, "heldout", texts)
    return [entry for entry in entries if entry["sha256"] not in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every file has been found, 1 where some are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data.json of the model")
    parser.add_argument("--list", action="store_true", help="print what the files come from, and end")
    parser.add_argument("--corpus", type=Path, default=Path("build/heldout"), help="where the files are written")
    parser.add_argument("--source", type=Path, nargs="+", default=[], help="folders of wheels or of installed packages")
    options = parser.parse_args(arguments)
    summary = json.loads(options.data.read_text())
    if options.list:
        print("\n".join(requirements(summary)))
        return 0
    missing = rebuild(summary, options.source, options.corpus)
    total = len(summary["heldout_files"])
    print(f"{total - len(missing)} of {total} held-out files, every one with its hash, in {options.corpus}")
    for package, count in sorted(Counter(entry["package"] for entry in missing).items()):
        print(f"missing: {count} of {package}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
