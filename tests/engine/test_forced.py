"""Tokens that a grammar forces, taken at once: the same outputs as one by one, in fewer steps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from app.engine import forced
from app.engine.constraints import NOTHING_ALLOWED, Constraint, constraints_of
from app.engine.engine import Engine
from app.engine.forced import take_forced
from app.engine.matchers import MAX_FORCED, Compiler, num_words
from app.engine.request import FinishReason, GenerationRequest, Grammar
from app.engine.sequence import Forced, Outlook, RowEnd, StepPlan
from mamba_core import MambaCache
from tests.engine.constrained import assert_obeyed, crowd, run
from tests.engine.fakes import (
    MODES,
    VOCAB_SIZE,
    HistoryModel,
    Transcript,
    greedy,
    make_cache,
    make_request,
    make_runner,
)
from tests.engine.spelling import END, make_compiler, regex, spell, tokens_of

PROMPT = (1, 2, 3)
# runs at the start, between choices, and at the end
WORDS = regex("(abcd|xyz)000[ab]{2}(cdio1|p22222)[xy](true|false)")


def schema(**properties: object) -> Grammar:
    return Grammar(
        "json_schema",
        json.dumps(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
                "x-guidance": {"whitespace_pattern": ""},
            }
        ),
    )


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
GRAMMARS = {
    "words": WORDS,
    "one text": regex("abcdiopxyz"),
    "endless": regex("(abc|xy[01]zzz)+"),
    "choice": Grammar("choice", '["abcd", "abio", "xyz", "xyz0000"]'),
    "names": schema(abcd=DIGIT, trueoo=DIGIT, xyzpo={"enum": ["abc", "c", "xyzxyz"]}),
    "nested": schema(a=json.loads(schema(bc=DIGIT).source), dio={"type": "array", "items": DIGIT, "maxItems": 3}),
    "rules": Grammar("grammar", 'root ::= "abc" tail\ntail ::= "x" | "yyyy" tail'),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 5, "n": 3},
    "filtered": {"temperature": 3.0, "top_k": 9, "min_p": 0.01, "seed": 6},
    "penalties": {"temperature": 2.0, "frequency_penalty": 1.2, "repetition_penalty": 1.4, "seed": 7, "n": 2},
    "greedy penalties": {"presence_penalty": 1.1, "frequency_penalty": 0.7},
    "bias": {"temperature": 1.0, "logit_bias": ((tokens_of("x")[0], -3.0),), "seed": 8},
    "logprobs": {"temperature": 1.0, "logprobs": 2, "seed": 9},
    "prompt logprobs": {"prompt_logprobs": 1},
    "no end of text": {"stop": ()},
    "more ends": {"stop": (END, *tokens_of("o0"))},
    "few tokens": {"max_tokens": 6, "n": 2, "temperature": 1.0, "seed": 10},
    "two tokens": {"max_tokens": 2},
    "min tokens": {"min_tokens": 8, "stop": (END, *tokens_of("z"))},
    "bad words": {"bad_words": (tuple(tokens_of("cd")), tuple(tokens_of("yz0")), (3, *tokens_of("a")))},
    "allowed": {"allowed_token_ids": (END, *tokens_of('abcdxyz0123"{}:,'))},
}

EngineMaker = Callable[..., Engine]


@pytest.fixture(params=[*MODES, "uniform"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return make_compiler(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_engine(mode: str, compiler: Compiler) -> EngineMaker:
    def make(
        num_slots: int = 6, before_step: Callable[[StepPlan, MambaCache], None] | None = None, **options: Any
    ) -> Engine:
        cache = make_cache(num_slots)
        return Engine(
            make_runner(mode, HistoryModel(), cache, VOCAB_SIZE),
            num_slots=num_slots,
            vocab_size=VOCAB_SIZE,
            prefill_budget=options.get("prefill_budget", 8),
            before_step=(lambda plan: before_step(plan, cache)) if before_step else None,
            grammars=compiler,
        )

    return make


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setitem(forced.STEPS_PER_CHUNK, "cpu", math.inf)


def request_of(name: str, grammar: Grammar, **fields: Any) -> GenerationRequest:
    return make_request(
        name, fields.pop("prompt", PROMPT), **{"max_tokens": 40, "stop": (END,), **fields}, grammar=grammar
    )


def everything() -> list[GenerationRequest]:
    return [
        request_of(f"{way}, {name}", grammar, prompt=[1 + i, 2, 3 + j], **fields)
        for i, (name, grammar) in enumerate(GRAMMARS.items())
        for j, (way, fields) in enumerate(WAYS.items())
    ]


# --- through the engine


def test_every_output_is_that_of_tokens_drawn_one_by_one(
    make_engine: EngineMaker, one_by_one: Callable[[], None]
) -> None:
    requests = [*everything(), *(make_request(f"p{i}", [i], 30, temperature=1.0, seed=i) for i in range(4))]
    engine = make_engine()
    at_once = run(engine, *requests)
    one_by_one()
    plain_engine = make_engine()
    drawn = run(plain_engine, *requests)
    assert at_once.tokens == drawn.tokens
    assert at_once.prompt_slices == drawn.prompt_slices
    for key, events in drawn.events.items():
        # an end without a token may come with the last token or behind it, but it is the same
        assert [e.logprobs for e in at_once.events[key]] == [e.logprobs for e in events], key
        assert at_once.ends[key] == drawn.ends[key]
    assert engine.stats.num_steps < 0.8 * plain_engine.stats.num_steps
    assert engine.stats.num_decode_tokens <= plain_engine.stats.num_decode_tokens


def test_rows_beside_are_what_they_are_alone(make_engine: EngineMaker) -> None:
    for request in everything()[::4]:
        alone = run(make_engine(num_slots=3), request)
        plain = make_request("p", (4, 4), 25)
        beside = run(make_engine(num_slots=4), plain, request)
        assert beside.tokens.pop(("p", 0)) == greedy((4, 4), 25)
        assert beside.tokens == alone.tokens


@pytest.mark.parametrize("max_tokens", range(1, 13))
def test_max_tokens_cuts_a_run_short(make_engine: EngineMaker, max_tokens: int) -> None:
    transcript = run(make_engine(), request_of("r", regex("abcdiopxyz"), max_tokens=max_tokens))
    assert spell(transcript.tokens["r", 0]) == "abcdiopxyz"[:max_tokens]
    assert transcript.reason("r") is (FinishReason.STOP if max_tokens > 10 else FinishReason.LENGTH)


def test_one_text_takes_one_step(make_engine: EngineMaker) -> None:
    engine = make_engine(prefill_budget=20)
    transcript = run(engine, request_of("r", regex("abcdiopxyz"), n=3))
    assert engine.stats.num_steps == 1
    assert {spell(tokens) for tokens in transcript.tokens.values()} == {"abcdiopxyz"}
    assert all(end.stop_reason == END for end in transcript.ends.values())
    transcript = run(engine, request_of("s", regex("abcdiopxyz"), stop=()))
    assert transcript.ends["s", 0].token_id is None
    assert transcript.reason("s") is FinishReason.STOP
    # when the end is found the next step may be planned
    assert engine.stats.num_steps in (2, 3)


def test_what_every_sample_begins_with_is_taken_with_the_prompt(make_engine: EngineMaker) -> None:
    engine = make_engine(prefill_budget=4)
    transcript = run(engine, request_of("r", regex("abcdio[xy]{3}"), n=3, temperature=2.0, seed=1))
    assert all(spell(tokens).startswith("abcdio") for tokens in transcript.tokens.values())
    # the prompt but its last token, and that with all but the last of these: once for all samples
    assert engine.stats.num_prefill_tokens == len(PROMPT) - 1 + 6
    assert engine.stats.num_decode_tokens in (3 * 4, 3 * 3)
    assert [event.token_id for event in transcript.events["r", 2]] == transcript.tokens["r", 2]


def test_a_beginning_neither_ends_a_sample_nor_exceeds_it(make_engine: EngineMaker) -> None:
    (stop,) = tokens_of("d")
    engine = make_engine()
    for max_tokens, stops, expected in [(1, (), "a"), (2, (), "ab"), (6, (stop,), "abcd"), (2, (stop,), "ab")]:
        transcript = run(engine, request_of("r", regex("abcdio[xy]"), max_tokens=max_tokens, stop=stops))
        assert spell(transcript.tokens["r", 0]) == expected
        assert transcript.reason("r") is (FinishReason.STOP if expected == "abcd" else FinishReason.LENGTH)


def test_several_ends_of_text_are_drawn_from(mode: str, tmp_path: Path) -> None:
    ends = (END, *tokens_of("z"))
    cache = make_cache(2)
    runner = make_runner(mode, HistoryModel(), cache, VOCAB_SIZE)
    grammars = make_compiler(tmp_path, ends=ends)
    engine = Engine(runner, num_slots=2, vocab_size=VOCAB_SIZE, prefill_budget=9, grammars=grammars)
    transcript = run(engine, request_of("r", regex("abc"), stop=ends))
    assert spell(transcript.tokens["r", 0][:3]) == "abc"
    assert transcript.ends["r", 0].stop_reason in ends


def test_a_stop_token_in_a_run_ends_the_sample(make_engine: EngineMaker) -> None:
    (stop,) = tokens_of("o")
    transcript = run(make_engine(), request_of("r", regex("abcdiopxyz"), stop=(END, stop)))
    assert spell(transcript.tokens["r", 0]) == "abcdio"
    assert transcript.ends["r", 0].stop_reason == stop


def test_tokens_of_rows_that_want_log_probabilities_are_drawn(make_engine: EngineMaker) -> None:
    engine = make_engine()
    transcript = run(engine, request_of("r", regex("abcdiopxyz"), logprobs=1))
    assert engine.stats.num_steps >= 11
    assert all(event.logprobs is not None for event in transcript.events["r", 0])


def test_an_abort_before_the_first_step_tells_no_tokens(make_engine: EngineMaker) -> None:
    engine = make_engine(num_slots=1)
    engine.submit(make_request("p", PROMPT, 5))
    engine.submit(request_of("r", regex("abcdiopxyz")))
    while engine.is_compiling:
        engine.step()
    engine.abort("r")
    transcript = Transcript()
    while engine.has_work:
        transcript.add(engine.step())
        engine.check_integrity()
    assert ("r", 0) not in transcript.tokens
    assert transcript.reason("r") is FinishReason.ABORT


def test_a_text_that_is_longer_than_a_run(make_engine: EngineMaker) -> None:
    text = "".join(random.Random(1).choices("abcdxyz012", k=3 * MAX_FORCED + 10))
    engine = make_engine(prefill_budget=20)
    transcript = run(engine, request_of("r", regex(text), max_tokens=400), make_request("p", PROMPT, 9))
    assert spell(transcript.tokens["r", 0]) == text
    assert transcript.tokens["p", 0] == greedy(PROMPT, 9)
    assert engine.stats.num_steps < 20


@pytest.mark.parametrize("seed", range(3))
def test_faults_change_no_token(make_engine: EngineMaker, seed: int) -> None:
    requests = everything()[seed::3]
    source = random.Random(seed)
    num_faults = 0

    def before_step(plan: StepPlan, cache: MambaCache) -> None:
        nonlocal num_faults
        if not plan.is_solo and len(plan.members) > 3 and source.random() < 0.15:
            num_faults += 1
            cache.ssm[:] = 1234.0
            raise RuntimeError("a fault")

    with_faults, without = run(make_engine(before_step=before_step), *requests), run(make_engine(), *requests)
    assert num_faults >= 3
    assert with_faults.tokens == without.tokens
    assert with_faults.ends == without.ends


@pytest.mark.parametrize("seed", range(3))
def test_samples_may_be_aborted_at_any_moment(make_engine: EngineMaker, seed: int) -> None:
    source = random.Random(seed)
    whole = run(make_engine(), *(requests := everything()[seed::5]))
    engine = make_engine()
    for request in requests:
        engine.submit(request)
    transcript = Transcript()
    while engine.has_work or engine.is_compiling:
        transcript.add(engine.step())
        engine.check_integrity()
        if source.random() < 0.3:
            victim = source.choice(requests)
            engine.abort(victim.request_id, source.choice([None, *range(victim.n)]))
    assert engine.stats.num_slots_used == 0
    reasons = {end.finish_reason for end in transcript.ends.values()}
    assert FinishReason.ABORT in reasons
    assert len(reasons) > 1
    for key, tokens in transcript.tokens.items():
        is_aborted = transcript.ends[key].finish_reason is FinishReason.ABORT
        assert tokens == (whole.tokens[key][: len(tokens)] if is_aborted else whole.tokens[key])


def test_the_crowd_obeys(make_engine: EngineMaker, one_by_one: Callable[[], None]) -> None:
    requests = crowd()
    at_once = run(make_engine(num_slots=12, prefill_budget=40), *requests)
    assert_obeyed(requests, at_once)
    one_by_one()
    assert run(make_engine(num_slots=12, prefill_budget=40), *requests).tokens == at_once.tokens


def test_only_as_many_are_taken_as_are_worth_a_chunk(make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a row alone is worth it, that of one beside three others is not."""
    request = request_of("r", regex("[ab]{8}cdioc[ab]"))
    steps: dict[tuple[float, int], int] = {}
    for cost in (0.0, 2.0):
        monkeypatch.setitem(forced.STEPS_PER_CHUNK, "cpu", cost)
        for num_others in (0, 3):
            engine = make_engine()
            others = [make_request(f"p{k}", (k,), 50) for k in range(num_others)]
            engine.submit(request)
            transcript = Transcript()
            while not transcript.tokens:
                transcript.add(engine.step())
            for other in others:
                engine.submit(other)
            before = engine.stats.num_steps
            while ("r", 0) not in transcript.ends:
                transcript.add(engine.step())
            steps[cost, num_others] = engine.stats.num_steps - before
            run(engine)
    # four of the five take no step of their own
    assert {key: steps[2.0, 3] - number for key, number in steps.items()} == {
        (0.0, 0): 4,
        (0.0, 3): 4,
        (2.0, 0): 4,
        (2.0, 3): 0,
    }


# --- what is worth it


class Foreseen:
    """A constraint with an outlook."""

    def __init__(self, num_tokens: int, is_end: bool = False) -> None:
        self.outlook = Outlook(num_tokens, is_end)

    def run_ahead(self) -> Forced:
        return Forced((7,) * self.outlook.num_tokens)


@pytest.mark.parametrize(
    ("outlooks", "num_rows", "cost", "taken"),
    [
        ([0], 1, 0.0, []),
        ([1], 1, 0.0, []),
        ([2], 1, 0.0, [0]),
        ([2], 1, 2.0, []),
        ([3], 1, 2.0, [0]),
        ([0, 5], 2, 2.0, []),
        ([0, 6], 2, 2.0, [1]),
        ([3, 2], 2, 2.0, [0, 1]),
        ([2, 2], 2, 2.0, []),
        ([4, 1, 5], 3, 2.0, [0, 2]),
        ([4], 1, math.inf, []),
    ],
)
def test_runs_are_taken_together_or_not(outlooks: list[int], num_rows: int, cost: float, taken: list[int]) -> None:
    constraints: list[tuple[int, Any]] = [(row, Foreseen(count)) for row, count in enumerate(outlooks)]
    assert sorted(take_forced(constraints, num_rows, cost)) == taken


def test_what_ends_a_sample_costs_nothing() -> None:
    constraints: list[tuple[int, Any]] = [(3, Foreseen(1, is_end=True)), (4, Foreseen(2))]
    assert list(take_forced(constraints, 9, 2.0)) == [3]
    assert take_forced(constraints, 9, math.inf) == {}


# --- constraints


def constraint_of(compiler: Compiler, grammar: Grammar, **fields: Any) -> Constraint:
    request = request_of("r", grammar, **fields)
    (constraint,) = constraints_of(request, VOCAB_SIZE, compiler.compile(grammar))
    constraint.restart([])
    return constraint


def allowed_by(constraint: Constraint) -> set[int] | RowEnd:
    words = np.empty(2, dtype=np.int32)
    end = constraint.write(words)
    return end or set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_a_run_is_what_masks_would_allow_one_by_one(compiler: Compiler) -> None:
    for name, grammar in GRAMMARS.items():
        for way, fields in WAYS.items():
            source = random.Random(name + way)
            ahead, behind = (constraint_of(compiler, grammar, **{**fields, "n": 1}) for _ in range(2))
            for _ in range(30):
                allowed = allowed_by(ahead)
                assert allowed_by(behind) == allowed
                if isinstance(allowed, RowEnd):
                    break
                num_tokens, is_end = ahead.outlook
                assert num_tokens == 0 or len(allowed) == 1
                taken = ahead.run_ahead() if num_tokens else Forced((source.choice(sorted(allowed)),))
                for token in taken.tokens:
                    allowed = allowed_by(behind)
                    assert allowed == {token} or num_tokens == 0
                    behind.accept(token)
                if num_tokens == 0:
                    ahead.accept(*taken.tokens)
                if taken.end is not None:
                    assert allowed_by(behind) == taken.end
                    break
                if taken.tokens[-1] == END:
                    assert is_end or num_tokens == 0
                    break


def test_the_outlook_of_a_choice(compiler: Compiler) -> None:
    constraint = constraint_of(compiler, regex("(abc|xyz)d"))
    assert allowed_by(constraint) == set(tokens_of("ax"))
    assert constraint.outlook == Outlook(0, False)
    constraint.accept(*tokens_of("a"))
    assert allowed_by(constraint) == set(tokens_of("b"))
    assert constraint.outlook == Outlook(3, True)
    assert constraint.run_ahead() == Forced((*tokens_of("bcd"), END))
    # computed again after a fault, in the middle of what was certain
    constraint.restart(tokens_of("xy"))
    assert allowed_by(constraint) == set(tokens_of("z"))
    assert constraint.outlook == Outlook(2, True)
    constraint.accept(-1)
    assert constraint.outlook == Outlook(0, False)
    constraint.restart(tokens_of("xy"))
    assert allowed_by(constraint) == set(tokens_of("z"))


def test_rules_end_a_run(compiler: Compiler) -> None:
    a, b, c, d = tokens_of("abcd")
    constraint = constraint_of(compiler, regex("abcd"), bad_words=((b, c),))
    assert allowed_by(constraint) == {a}
    assert constraint.run_ahead() == Forced((a, b))
    assert isinstance(allowed_by(constraint), RowEnd)
    # no end of text may follow yet, so that the sample ends without one
    constraint = constraint_of(compiler, regex("abcd"), min_tokens=9)
    assert allowed_by(constraint) == {a}
    assert constraint.run_ahead() == Forced((a, b, c, d), RowEnd(FinishReason.STOP))
    constraint = constraint_of(compiler, regex("abcd"), logprobs=0)
    assert allowed_by(constraint) == {a}
    assert constraint.outlook == Outlook(0, False)


def test_a_token_that_was_not_foreseen_is_told(compiler: Compiler) -> None:
    a, b = tokens_of("ab")
    constraint = constraint_of(compiler, regex("abcd"))
    assert allowed_by(constraint) == {a}
    constraint.accept(b)
    assert isinstance(allowed_by(constraint), RowEnd)
    constraint.restart([a])
    assert allowed_by(constraint) == {b}


def test_tokens_that_the_model_has_not_are_not_forced(tmp_path: Path) -> None:
    few = make_compiler(tmp_path, VOCAB_SIZE).compile(regex("ab"))
    few._vocab_size = tokens_of("b")[0]
    assert few.force() == tokens_of("a")


def test_a_run_once_begun_is_kept() -> None:
    """The library spells the rest of a text in another way once its beginning was drawn."""
    grammar = regex("(x|yy)abc def ghi(jkl)?")
    request = request_of("r", grammar)
    shipped = Path(__file__).parents[2] / "models" / "mamba-python-15m"
    backend = Backend.from_file(str(shipped / "tokenizer.json"))
    compiled = Compiler(shipped, backend.get_vocab_size(), [0]).compile(grammar)
    (constraint,) = constraints_of(request, backend.get_vocab_size(), compiled)
    words = np.empty(num_words(backend.get_vocab_size()), dtype=np.int32)
    constraint.accept(backend.token_to_id("x"))
    drawn = []
    while constraint.write(words) is None and constraint.outlook.num_tokens:
        (token,) = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        drawn.append(token)
        constraint.accept(token)
    assert drawn == backend.encode("abc def g").ids
    compiled = compiled.copy()
    compiled.accept(backend.token_to_id("x"))
    one_by_one = []
    while tokens := compiled._matcher.compute_ff_tokens():
        one_by_one.append(tokens[0])
        compiled.accept(tokens[0])
    assert backend.decode(one_by_one) == backend.decode(drawn)
    assert one_by_one != drawn


def test_an_error_keeps_its_reason(compiler: Compiler) -> None:
    constraint = constraint_of(compiler, regex("abcd"), allowed_token_ids=tuple(tokens_of("xyz")))
    end = allowed_by(constraint)
    assert isinstance(end, RowEnd)
    assert end.error == NOTHING_ALLOWED
    assert end.reason is FinishReason.INVALID
