"""The comparison of grammar libraries measures what it says, as far as the one in use goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.engine.request import Grammar
from benchmarks import grammars
from tests.engine.bytes_tokenizer import write_byte_tokenizer


@pytest.mark.parametrize("name", grammars.SCHEMAS)
def test_every_schema_can_be_used_and_followed(tmp_path: Path, name: str) -> None:
    compile_grammar = grammars.with_llguidance(write_byte_tokenizer(tmp_path))
    grammar = Grammar("json_schema", json.dumps(grammars.SCHEMAS[name]))
    compiling, masks = grammars.measure(compile_grammar, grammar)
    assert compiling > 0
    assert len(masks) > 1
    assert min(masks) > 0


def test_the_outcome_of_a_hostile_grammar_is_told(tmp_path: Path) -> None:
    compile_grammar = grammars.with_llguidance(write_byte_tokenizer(tmp_path))
    told = grammars.attack_once(compile_grammar, grammars.HOSTILE["schema {$ref: #}"])
    assert told.startswith("refused after")
    assert "no text matches it" in told
    told = grammars.attack_once(compile_grammar, grammars.HOSTILE["regex [a-z]{1,100000}"])
    assert told.startswith("compiled in")
