"""A small corpus and tokenizer from this interpreter's own library, made once for all tests of the recipe."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from models.recipe.corpus import Documents, write_documents
from models.recipe.tokenizer import save_tokenizer_files, train_tokenizer


@dataclass(frozen=True, slots=True)
class TinyRun:
    """Where the corpus and the tokenizer lie."""

    corpus: Path
    tokenizer: Path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("tiny")
    json_package = Path(sysconfig.get_paths()["stdlib"]) / "json"
    email_package = Path(sysconfig.get_paths()["stdlib"]) / "email"
    write_documents(folder, "train", [path.read_bytes() for path in sorted(email_package.glob("*.py"))])
    write_documents(folder, "heldout", [path.read_bytes() for path in sorted(json_package.glob("*.py"))])
    tokenizer = train_tokenizer(Documents(folder, "train"), vocab_size=512, sample_bytes=200_000, seed=0)
    save_tokenizer_files(tokenizer, folder / "tokenizer")
    return TinyRun(folder, folder / "tokenizer" / "tokenizer.json")
