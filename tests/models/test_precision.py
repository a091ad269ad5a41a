"""Bits per byte in every precision: prompts and steps agree, int8 costs something, and the card tells both."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

from mamba_core.quantization import Int8Linear
from models.recipe.card import _precisions
from models.recipe.corpus import write_documents
from models.recipe.evaluate import file_bits
from models.recipe.export import export_model
from models.recipe.model import new_config, new_model, token_losses
from models.recipe.precision import Precision, measure, step_bits
from models.recipe.tokenizer import load_tokenizer
from tests.models.conftest import TinyRun

EXACT = Precision("float32", "none")
INT8 = Precision("float32", "int8")


@pytest.fixture
def exported(tiny_run: TinyRun, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    export_model(new_model(new_config(vocab_size=512, hidden_size=16, num_layers=2), 0, torch.device("cpu")), folder)
    shutil.copy(tiny_run.tokenizer, folder / "tokenizer.json")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    # more files than are stepped at once, some of one length
    texts = [f"value_{number % 7} = {'word ' * (number % 5)}{number}\n".encode() for number in range(40)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_documents(folder, "heldout", texts)
    return folder


def test_precisions_are_read_from_their_names() -> None:
    assert Precision.parse("bfloat16+int8") == Precision("bfloat16", "int8")
    assert Precision.parse("float32") == EXACT
    for wrong in ("float16", "float32+int4", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="unknown precision"):
            Precision.parse(wrong)


@pytest.mark.parametrize("precision", [EXACT, INT8])
def test_steps_cost_every_file_what_it_costs_as_a_prompt(exported: Path, corpus: Path, precision: Precision) -> None:
    tokenizer = load_tokenizer(exported / "tokenizer.json")

    prompts = file_bits(precision.load(exported), tokenizer, corpus)
    steps = step_bits(precision.load(exported), tokenizer, corpus)

    assert steps["bits"] == pytest.approx(prompts["bits"], rel=1e-3)
    assert steps["bytes"] == prompts["bytes"]
    assert steps["tokens"] == prompts["tokens"]


def test_steps_can_be_made_for_some_files_alone(exported: Path, corpus: Path) -> None:
    tokenizer = load_tokenizer(exported / "tokenizer.json")
    model = EXACT.load(exported)

    some, whole = step_bits(model, tokenizer, corpus, every=3), step_bits(model, tokenizer, corpus)

    assert len(some["bits"]) == 14
    assert some["bits"] == pytest.approx(whole["bits"][::3], rel=1e-5)
    assert some["bytes"] == whole["bytes"][::3]


def test_what_has_been_measured_is_not_measured_again(exported: Path, corpus: Path) -> None:
    first = measure(exported, corpus, [EXACT])
    shutil.rmtree(corpus)

    again = measure(exported, corpus, [EXACT])

    assert again == first


def test_int8_is_of_the_head_as_well(exported: Path) -> None:
    tokens = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    model = INT8.load(exported)

    own = model(tokens, labels=tokens).loss

    assert isinstance(model.lm_head, Int8Linear)
    assert token_losses(model, tokens).mean().item() == pytest.approx(own.item(), rel=1e-4)
    assert not torch.equal(token_losses(model, tokens), token_losses(EXACT.load(exported), tokens))


def test_results_are_kept_as_they_come_and_told_in_the_card(exported: Path, corpus: Path) -> None:
    record = measure(exported, corpus, [EXACT, INT8])

    assert json.loads((exported / "precision.json").read_text()) == record
    assert [(r["quantization"], r["way"]) for r in record["results"]] == [
        ("none", "prompts"), ("int8", "prompts"), ("none", "steps"), ("int8", "steps"),
    ]  # fmt: skip
    exact, int8 = (sum(result["bits"]) / sum(result["bytes"]) for result in record["results"][:2])
    lines = _precisions(record).splitlines()
    assert f"| float32 | {exact:.5f} (+0.000%) | " in next(line for line in lines if line.startswith("| float32 |"))
    row = next(line for line in lines if line.startswith("| float32, int8 matrices"))
    assert f"{int8:.5f} ({int8 / exact - 1:+.3%})" in row


def test_a_card_with_one_way_alone_says_so() -> None:
    result = {"dtype": "bfloat16", "quantization": "none", "way": "steps", "bits": [8.0], "bytes": [4], "tokens": [2]}

    assert "| bfloat16 | – | 2.00000 |" in _precisions({"torch": "2.13.0", "results": [result]})
