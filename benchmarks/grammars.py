"""What holding outputs to grammars costs, with llguidance and, where it is installed, with xgrammar.

    python -m benchmarks.grammars TOKENIZER_DIR

Compiles ten JSON schemas and a few other grammars, follows a random output of each, and prints milliseconds for the
first and microseconds per mask for the second. Then gives each library what a hostile client might, in a process of its
own. Times are those of one thread, the least of three compilations.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from app.engine.grammars import limits, to_lark
from app.engine.matchers import Matcher
from app.engine.request import Grammar
from app.serving.tokenizer import Tokenizer

NUM_TOKENS = 200
HOSTILE_SECONDS = 10.0

STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def record(**properties: object) -> dict[str, object]:
    """A schema of an object that has exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def items(schema: object, **limits: int) -> dict[str, object]:
    """A schema of a list."""
    return {"type": "array", "items": schema, **limits}


ADDRESS = record(street=STRING, city=STRING, zip={"type": "string", "pattern": "^[0-9]{5}$"})
SCHEMAS: dict[str, dict[str, object]] = {
    "person": record(name=STRING, age={"type": "integer", "minimum": 0, "maximum": 150}, email=STRING),
    "choice": record(sentiment={"enum": ["positive", "negative", "neutral"]}, confidence=NUMBER),
    "address": record(home=ADDRESS, work={"anyOf": [ADDRESS, {"type": "null"}]}),
    "invoice": record(
        number=STRING,
        lines=items(record(text=STRING, amount=NUMBER, quantity=INTEGER), minItems=1, maxItems=20),
        total=NUMBER,
    ),
    "dates": record(begin={"type": "string", "format": "date-time"}, end={"type": "string", "format": "date"}),
    "tree": {
        "$defs": {"node": record(label=STRING, children=items({"$ref": "#/$defs/node"}))},
        "$ref": "#/$defs/node",
    },
    "tools": {
        "anyOf": [
            record(name={"const": f"tool_{k}"}, arguments=record(**{f"arg_{j}": STRING for j in range(k + 1)}))
            for k in range(12)
        ]
    },
    "wide": record(**{f"field_{k}": (STRING, INTEGER, NUMBER, {"type": "boolean"})[k % 4] for k in range(60)}),
    "open": {"type": "object", "properties": {f"option_{k}": STRING for k in range(20)}},
    "lists": record(matrix=items(items(NUMBER)), tags=items({"type": "string", "maxLength": 20})),
}
OTHERS = {
    "any object": Grammar("json_object"),
    "phone": Grammar("regex", r"\+?[0-9]{1,3}[ -]([0-9]{2,4}[ -]){1,3}[0-9]{2,6}"),
    "words": Grammar("regex", r"([A-Z][a-z]{0,15} ?){1,20}\."),
    "choices": Grammar("choice", json.dumps([f"label {k}" for k in range(200)])),
}

HOSTILE = {
    "regex (a+)+$": Grammar("regex", "(a+)+$"),
    "regex [a-z]{1,100000}": Grammar("regex", "[a-z]{1,100000}"),
    "regex (.*a.{20})+": Grammar("regex", "(.*a.{20})+"),
    "regex a?, 15,000 times": Grammar("regex", "a?" * 15_000),
    "schema nested 60 deep": Grammar("json_schema", '{"type":"array","items":' * 60 + "{}" + "}" * 60),
    "schema nested 10,000 deep": Grammar("json_schema", '{"items":' * 6_000 + "{}" + "}" * 6_000),
    "schema {$ref: #}": Grammar("json_schema", '{"$ref": "#"}'),
    "schema minItems 100,000": Grammar("json_schema", json.dumps(items(INTEGER, minItems=100_000))),
    "schema maxLength 1,000,000": Grammar("json_schema", '{"type": "string", "maxLength": 1000000}'),
    "schema patternProperties": Grammar("json_schema", '{"patternProperties": {"^(a|b)*c$": {"type": "integer"}}}'),
    "schema 500 properties": Grammar("json_schema", json.dumps(record(**{f"p{k}": STRING for k in range(500)}))),
    "schema 120 patterns": Grammar(
        "json_schema", json.dumps({"allOf": [{"pattern": f"^.*{k}.*$"} for k in range(120)]})
    ),
}


class Output(Protocol):
    """One output of a compiled grammar."""

    def allowed(self) -> NDArray[np.int32]:
        """Bits of the tokens that may follow."""

    def accept(self, token: int) -> None:
        """Stand behind one more token."""


Compile = Callable[[Grammar], Output]


def with_llguidance(directory: Path) -> Compile:
    """Compiles as the engine does."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer((directory / "tokenizer.json").read_text(encoding="utf-8"), eos_token=[0])

    def compile_grammar(grammar: Grammar) -> Output:
        matcher = LLMatcher(tokenizer, to_lark(grammar), log_level=0, limits=limits())
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return Matcher(grammar, matcher, tokenizer.vocab_size, (0,))

    return compile_grammar


class XgrammarOutput:
    """One output, by xgrammar."""

    def __init__(self, library: Any, compiled: Any, vocab_size: int) -> None:
        self._matcher = library.GrammarMatcher(compiled)
        self._mask = library.allocate_token_bitmask(1, vocab_size)

    def allowed(self) -> NDArray[np.int32]:
        """Bits of the tokens that may follow."""
        self._matcher.fill_next_token_bitmask(self._mask)
        words: NDArray[np.int32] = self._mask[0].numpy()
        return words

    def accept(self, token: int) -> None:
        """Stand behind one more token."""
        self._matcher.accept_token(token)


def with_xgrammar(directory: Path) -> Compile:
    """Compiles with xgrammar, one thread, nothing kept."""
    library = importlib.import_module("xgrammar")
    vocabulary = list(Tokenizer.from_dir(directory).token_bytes or ())
    kind = library.VocabType.RAW
    info = library.TokenizerInfo(vocabulary, vocab_type=kind, vocab_size=len(vocabulary), stop_token_ids=[0])
    compiler = library.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile_grammar(grammar: Grammar) -> Output:
        if grammar.kind == "regex":
            compiled = compiler.compile_regex(grammar.source)
        elif grammar.kind == "json_object":
            compiled = compiler.compile_builtin_json_grammar()
        elif grammar.kind == "choice":
            choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.source))
            compiled = compiler.compile_grammar(f"root ::= {choices}")
        else:
            compiled = compiler.compile_json_schema(grammar.source)
        return XgrammarOutput(library, compiled, len(vocabulary))

    return compile_grammar


LIBRARIES = {"llguidance": with_llguidance, "xgrammar": with_xgrammar}


def follow(output: Output, seed: int = 0) -> Iterator[float]:
    """Seconds of each mask along a random output."""
    source = random.Random(seed)
    for _ in range(NUM_TOKENS):
        begun = time.perf_counter()
        mask = output.allowed()
        yield time.perf_counter() - begun
        tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if tokens.tolist() in ([], [0]):
            return
        output.accept(int(source.choice(tokens[tokens != 0])))


def measure(compile_grammar: Compile, grammar: Grammar) -> tuple[float, list[float]]:
    """Seconds of compiling, the least of three, and of each mask."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        output = compile_grammar(grammar)
        seconds.append(time.perf_counter() - begun)
    return min(seconds), list(follow(output))


def compare(directory: Path, names: list[str]) -> None:
    """Print the table of grammars in use."""
    print("| grammar | library | compile ms | mask us, median | mean | largest | tokens |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    makers = {name: LIBRARIES[name](directory) for name in names}
    grammars = {f"schema {name}": Grammar("json_schema", json.dumps(schema)) for name, schema in SCHEMAS.items()}
    for title, grammar in (grammars | OTHERS).items():
        for name, compile_grammar in makers.items():
            try:
                compiling, masks = measure(compile_grammar, grammar)
            except Exception as error:
                print(f"| {title} | {name} | refused: {str(error).splitlines()[0][:60]} |")
                continue
            median, mean, largest = (1e6 * f(masks) for f in (statistics.median, statistics.mean, max))
            row = f"{1e3 * compiling:.1f} | {median:.0f} | {mean:.0f} | {largest:.0f} | {len(masks)}"
            print(f"| {title} | {name} | {row} |", flush=True)


def attack(directory: Path, names: list[str]) -> None:
    """Print the table of hostile grammars, each in a process of its own."""
    print("\n| hostile | library | outcome |\n| --- | --- | --- |")
    for title in HOSTILE:
        for name in names:
            command = [
                sys.executable,
                "-m",
                "benchmarks.grammars",
                str(directory),
                "--library",
                name,
                "--hostile",
                title,
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=HOSTILE_SECONDS, check=False)
                outcome = done.stdout.strip() or f"the process died ({done.returncode})"
            except subprocess.TimeoutExpired:
                outcome = f"not done after {HOSTILE_SECONDS:.0f} s"
            print(f"| {title} | {name} | {outcome} |", flush=True)


def attack_once(compile_grammar: Compile, grammar: Grammar) -> str:
    """What comes of one hostile grammar."""
    begun = time.perf_counter()
    try:
        output = compile_grammar(grammar)
        compiling = time.perf_counter() - begun
        masks = list(follow(output))
    except Exception as error:
        refused = " ".join(str(error).split())[:70]
        return f"refused after {1e3 * (time.perf_counter() - begun):.0f} ms: {refused}"
    mean, largest = 1e6 * statistics.mean(masks), 1e6 * max(masks)
    return f"compiled in {1e3 * compiling:.0f} ms, mask mean {mean:.0f} us, max {largest:.0f} us"


def main() -> None:
    """Measure what is installed, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="directory of tokenizer.json; token 0 ends a text")
    parser.add_argument(
        "--library", choices=LIBRARIES, action="append", help="which to measure; all that are installed"
    )
    parser.add_argument("--hostile", choices=HOSTILE, help="one hostile grammar, in this process")
    arguments = parser.parse_args()
    names = arguments.library or [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    if arguments.hostile:
        print(attack_once(LIBRARIES[names[0]](arguments.tokenizer), HOSTILE[arguments.hostile]))
        return
    compare(arguments.tokenizer, names)
    attack(arguments.tokenizer, names)


if __name__ == "__main__":
    main()
