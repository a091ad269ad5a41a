"""What taking forced tokens at once saves: outputs of JSON schemas with it and without, side by side.

    python -m benchmarks.forced --model models/mamba-python-15m
    python -m benchmarks.forced --random 130m --tokenizer models/mamba-python-15m --rows 1,8

Each line is one schema and one number of requests that start together, all with other seeds, beside as many plain ones
as ``--beside`` says. Both ways take turns, and draw the same tokens but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from app.engine import forced
from app.engine.config import EngineConfig
from app.engine.engine import Engine
from app.engine.loading import Placement, build_engine
from app.engine.matchers import Compiler, Matcher
from app.engine.request import GenerationRequest, Grammar, SamplingParams, TokenEvent
from benchmarks.grammars import record
from benchmarks.in_process import Subject, add_arguments, greedy_request, load_subject, numbers, print_line
from mamba_core import checkpoints

YES_OR_NO = {"type": "boolean"}
LONG_NAMES = (
    "customer_has_confirmed_the_delivery_address",
    "invoice_was_sent_by_electronic_mail",
    "payment_is_expected_within_thirty_days",
    "shipment_requires_a_customs_declaration",
    "contains_hazardous_or_perishable_goods",
    "previous_complaints_about_this_supplier",
)
COMPACT = {"x-guidance": {"whitespace_pattern": ""}}


def form(**properties: object) -> Grammar:
    """JSON without white space: how much of it a model likes would decide all else."""
    return Grammar("json_schema", json.dumps(record(**properties) | COMPACT))


CASES: dict[str, Grammar] = {
    "long names": form(**dict.fromkeys(LONG_NAMES, YES_OR_NO)),
    "short names": form(**{f"field_{k}": YES_OR_NO for k in range(12)}),
    "person": form(
        name={"type": "string", "maxLength": 20},
        age={"type": "integer", "maximum": 150},
        city={"enum": ["Ulm", "Bonn"]},
    ),
    "spaces": Grammar("json_schema", json.dumps(record(**dict.fromkeys(LONG_NAMES, YES_OR_NO)))),
    "choice": Grammar("choice", json.dumps(["the answer is certainly yes", "no, it cannot be said", "it depends"])),
}
MAX_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one crowd of requests: tokens by sample, seconds until each had ended, and those of steps beside them."""

    tokens: dict[str, list[int]]
    latencies: dict[str, float]
    gaps: list[float]

    @property
    def seconds(self) -> float:
        return max(self.latencies.values())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, help="directory of tokenizer.json, if not that of the model")
    parser.add_argument("--rows", type=numbers(int), default=[1, 4, 16], help="requests that start together")
    parser.add_argument("--beside", type=int, default=0, help="plain requests that run meanwhile")
    parser.add_argument("--case", choices=CASES, action="append", help="schemas; all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    return parser.parse_args(arguments)


class Watched:
    """A compiler that tells how many grammars it has compiled."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self.num_compiled = 0

    def compile(self, grammar: Grammar) -> Matcher:
        try:
            return self._compiler.compile(grammar)
        finally:
            self.num_compiled += 1

    def load(self) -> object:
        return self._compiler.load()


def make_engine(subject: Subject, tokenizer: Path, num_slots: int) -> tuple[Engine, Watched]:
    """An engine as the server builds it, warmed up, with grammars."""
    config = EngineConfig(subject.name, max_num_seqs=num_slots)
    placement = Placement(subject.device, subject.dtype, subject.state_dtype)
    compiler = Watched(Compiler(tokenizer, subject.config.vocab_size, (0,)))
    engine = build_engine(subject.model, config, placement, compiler)[0]
    while engine.prepare_more():
        pass
    return engine, compiler


@contextmanager
def one_by_one(device: str) -> Iterator[None]:
    """Let nothing be worth a chunk."""
    with patch.dict(forced.STEPS_PER_CHUNK, {device: math.inf}):
        yield


def submit(
    engine: Engine, compiler: Watched, grammar: Grammar, num_rows: int, options: argparse.Namespace, vocab_size: int
) -> None:
    """Queue a crowd, and wait until all its grammars are compiled."""
    before = compiler.num_compiled
    for row in range(num_rows):
        prompt = greedy_request(f"prompt {row}", options.prompt, 1, vocab_size).prompt_token_ids
        sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=row, grammar=grammar)
        engine.submit(GenerationRequest(str(row), prompt, sampling, MAX_TOKENS, (0,)))
    while compiler.num_compiled < before + num_rows:
        time.sleep(1e-4)
    # the engine hears of the last one a moment later
    time.sleep(1e-3)


def run(
    engine: Engine, compiler: Watched, grammar: Grammar, num_rows: int, options: argparse.Namespace, vocab_size: int
) -> Outcome:
    """One crowd, from the first step to its last end."""
    for row in range(options.beside):
        engine.submit(greedy_request(f"plain {row}", options.prompt, 100_000, vocab_size))
    while engine.stats.num_running < options.beside or engine.stats.last_step_prefill_tokens:
        engine.step()
    submit(engine, compiler, grammar, num_rows, options, vocab_size)
    outcome = Outcome({}, {}, [])
    start = before = time.perf_counter()
    while len(outcome.latencies) < num_rows:
        events = engine.step()
        now = time.perf_counter()
        outcome.gaps.append(now - before)
        before = now
        for event in events:
            if not isinstance(event, TokenEvent) or event.request_id.startswith("plain"):
                continue
            if event.token_id is not None:
                outcome.tokens.setdefault(event.request_id, []).append(event.token_id)
            if event.finish_reason is not None:
                outcome.latencies[event.request_id] = now - start
    for row in range(options.beside):
        engine.abort(f"plain {row}")
    while engine.has_work:
        engine.step()
    return outcome


def tell(outcomes: list[Outcome]) -> dict[str, Any]:
    """Medians over rounds."""
    num_tokens = sum(map(len, outcomes[0].tokens.values()))
    seconds = statistics.median(outcome.seconds for outcome in outcomes)
    latency = statistics.median(statistics.fmean(outcome.latencies.values()) for outcome in outcomes)
    return {
        "tokens_per_s": round(num_tokens / seconds),
        "latency_ms": round(1e3 * latency, 2),
        "steps": len(outcomes[0].gaps),
        "step_ms": round(1e3 * statistics.median(statistics.fmean(outcome.gaps) for outcome in outcomes), 3),
    }


def compare(
    subject: Subject,
    engine: Engine,
    compiler: Watched,
    grammar: Grammar,
    num_rows: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One case, both ways in turn."""
    vocab_size, device = subject.config.vocab_size, subject.device.type
    at_once, drawn = [], []
    run(engine, compiler, grammar, num_rows, options, vocab_size)
    for _ in range(options.rounds):
        at_once.append(run(engine, compiler, grammar, num_rows, options, vocab_size))
        with one_by_one(device):
            drawn.append(run(engine, compiler, grammar, num_rows, options, vocab_size))
    num_equal = sum(at_once[0].tokens[row] == drawn[0].tokens[row] for row in drawn[0].tokens)
    tokens = sum(map(len, drawn[0].tokens.values()))
    return {
        "requests": num_rows,
        "plain_beside": options.beside,
        "tokens": tokens,
        "equal": num_equal,
        "at_once": tell(at_once),
        "one_by_one": tell(drawn),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    subject = load_subject(options)
    tokenizer = options.tokenizer or checkpoints.resolve(options.model)
    engine, compiler = make_engine(subject, tokenizer, max(options.rows) + options.beside)
    for name in options.case or CASES:
        for num_rows in options.rows:
            outcome = compare(subject, engine, compiler, CASES[name], num_rows, options)
            print_line({"benchmark": "forced", **subject.describe(), "case": name, **outcome})


if __name__ == "__main__":
    main()
