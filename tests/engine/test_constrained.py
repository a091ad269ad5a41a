"""Rows that may not draw every token, through the engine: in all its modes, beside rows that may."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.engine.compiling import GrammarCompiler
from app.engine.engine import Engine, RequestRefused
from app.engine.grammars import GrammarError
from app.engine.matchers import Compiler, Matcher
from app.engine.request import FinishReason, Grammar
from app.engine.sequence import StepPlan
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
    taken_up,
)
from tests.engine.fakes import run as run_all
from tests.engine.spelling import END, make_compiler, regex, spell, tokens_of

PROMPT = (1, 2, 3)

EngineMaker = Callable[..., Engine]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    made = make_compiler(tmp_path_factory.mktemp("tokenizer"))
    made.load()
    return made


@pytest.fixture
def make_engine(mode: str, compiler: Compiler) -> EngineMaker:
    def make(
        num_slots: int = 4,
        prefill_budget: int = 8,
        before_step: Callable[[StepPlan, MambaCache], None] | None = None,
        grammars: GrammarCompiler | None = compiler,
    ) -> Engine:
        cache = make_cache(num_slots)
        return Engine(
            make_runner(mode, HistoryModel(), cache, VOCAB_SIZE),
            num_slots=num_slots,
            vocab_size=VOCAB_SIZE,
            prefill_budget=prefill_budget,
            before_step=(lambda plan: before_step(plan, cache)) if before_step else None,
            grammars=grammars,
        )

    return make


def test_every_rule_holds_with_every_way_of_drawing(make_engine: EngineMaker) -> None:
    requests = crowd()
    transcript = run(make_engine(num_slots=12, prefill_budget=40), *requests)
    assert_obeyed(requests, transcript)
    ended = [key for key, end in transcript.ends.items() if end.finish_reason is FinishReason.STOP]
    assert len(ended) > 20


def test_rows_beside_constrained_ones_draw_what_they_draw_alone(make_engine: EngineMaker) -> None:
    requests = crowd()
    together = run(make_engine(num_slots=64, prefill_budget=400), *requests)
    for request in requests:
        alone = run(make_engine(), request)
        for sample in range(request.n):
            key = request.request_id, sample
            assert together.tokens[key] == alone.tokens[key]
            assert together.ends[key].finish_reason == alone.ends[key].finish_reason
            assert [e.logprobs for e in together.events[key]] == [e.logprobs for e in alone.events[key]]


def test_all_modes_draw_the_same(mode: str, make_engine: EngineMaker, compiler: Compiler) -> None:
    if mode == "synchronous":
        pytest.skip("the mode compared with")
    cache = make_cache(8)
    runner = make_runner("synchronous", HistoryModel(), cache, VOCAB_SIZE)
    plain = Engine(runner, num_slots=8, vocab_size=VOCAB_SIZE, prefill_budget=8, grammars=compiler)
    requests = [request for request in crowd() if request.sampling.top_p == 1]
    assert run(make_engine(num_slots=8), *requests).tokens == run(plain, *requests).tokens


def test_log_probabilities_are_those_of_the_model(make_engine: EngineMaker) -> None:
    prompt = tokens_of("ab")
    free = run(make_engine(), make_request("r", prompt, 1, logprobs=3))
    held = run(make_engine(), make_request("r", prompt, 1, logprobs=3, allowed_token_ids=(9,)))
    assert held.tokens["r", 0] == [9]
    first, second = free.events["r", 0][0].logprobs, held.events["r", 0][0].logprobs
    assert first is not None
    assert second is not None
    assert first.top == second.top
    assert second.logprob < first.logprob


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_chooses_the_likeliest_of_what_it_allows(make_engine: EngineMaker, temperature: float) -> None:
    request = make_request("r", PROMPT, 30, grammar=Grammar("choice", '["abc", "x"]'), stop=[END])
    transcript = run(make_engine(), request, make_request("p", PROMPT, 5, temperature=temperature))
    assert spell(transcript.tokens["r", 0]) in ("abc", "x")
    assert transcript.tokens["r", 0][-1] == END
    assert transcript.ends["r", 0].stop_reason == END


def test_without_an_end_of_text_a_complete_output_ends_by_itself(make_engine: EngineMaker) -> None:
    transcript = run(make_engine(), make_request("r", PROMPT, 30, grammar=regex("[ab]{3}"), n=2))
    for sample in range(2):
        assert len(transcript.tokens["r", sample]) == 3
        end = transcript.ends["r", sample]
        assert (end.token_id, end.finish_reason, end.stop_reason) == (None, FinishReason.STOP, None)


def test_a_sample_without_any_token_left_fails_alone(make_engine: EngineMaker) -> None:
    stuck = make_request("s", PROMPT, 30, allowed_token_ids=(4, 5), bad_words=((4, 5), (4, 4), (5,)))
    transcript = run(make_engine(), stuck, make_request("p", PROMPT, 10))
    assert transcript.tokens["s", 0] == [4]
    end = transcript.ends["s", 0]
    assert end.finish_reason is FinishReason.INVALID
    assert "forbid all of them" in (end.error or "")
    assert transcript.tokens["p", 0] == greedy(PROMPT, 10)


def test_max_tokens_may_cut_an_output_short(make_engine: EngineMaker) -> None:
    transcript = run(make_engine(), make_request("r", PROMPT, 4, grammar=regex("[ab]{9}"), stop=[END]))
    assert len(transcript.tokens["r", 0]) == 4
    assert transcript.reason("r") is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"allowed_token_ids": ()}, "allows no token"),
        ({"allowed_token_ids": (1, VOCAB_SIZE)}, "allowed_token_ids"),
        ({"bad_words": ((1,), ())}, "is empty"),
        ({"bad_words": ((1, -1),)}, "bad_words"),
    ],
)
def test_rules_outside_the_vocabulary_are_refused(
    make_engine: EngineMaker, sampling: dict[str, object], message: str
) -> None:
    engine = make_engine()
    with pytest.raises(RequestRefused, match=message):
        engine.submit(make_request(**sampling))  # type: ignore[arg-type]
    assert not engine.has_work


# --- faults


class Fault(Exception):
    pass


@pytest.mark.parametrize("seed", range(3))
def test_faults_change_no_token(make_engine: EngineMaker, seed: int) -> None:
    requests = [request for request in crowd() if request.sampling.top_p == 1]
    source = random.Random(seed)
    num_faults = 0

    def before_step(plan: StepPlan, cache: MambaCache) -> None:
        nonlocal num_faults
        if not plan.is_solo and len(plan.members) > 3 and source.random() < 0.1:
            num_faults += 1
            cache.ssm[:] = 1234.0
            raise Fault

    with_faults = run(make_engine(num_slots=6, before_step=before_step), *requests)
    without = run(make_engine(num_slots=6), *requests)
    assert num_faults >= 3
    assert with_faults.tokens == without.tokens
    assert {key: end.finish_reason for key, end in with_faults.ends.items()} == {
        key: end.finish_reason for key, end in without.ends.items()
    }


def test_a_row_that_is_not_finite_fails_under_a_mask_as_well(make_engine: EngineMaker) -> None:
    def before_step(plan: StepPlan, cache: MambaCache) -> None:
        for sequence in plan.rows:
            if sequence.request.request_id == "r" and len(sequence.output) >= 2:
                cache.ssm[0, sequence.slot] = torch.nan

    engine = make_engine(before_step=before_step)
    transcript = run(engine, make_request("r", PROMPT, 9, allowed_token_ids=(4,)), make_request("p", PROMPT, 9))
    assert transcript.reason("r") is FinishReason.ERROR
    assert "NaN" in (transcript.ends["r", 0].error or "")
    assert transcript.tokens["p", 0] == greedy(PROMPT, 9)


def test_samples_may_be_aborted_one_by_one(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.submit(make_request("r", PROMPT, 50, n=3, grammar=regex("[ab]{40}"), stop=[END]))
    engine.submit(make_request("p", PROMPT, 30))
    transcript = Transcript()
    number = 0
    while engine.has_work or engine.is_compiling:
        transcript.add(engine.step())
        number += 1
        if len(transcript.tokens.get(("r", 1), [])) == 3:
            engine.abort("r", 1)
    assert transcript.reason("r", 1) is FinishReason.ABORT
    assert [len(transcript.tokens["r", sample]) for sample in (0, 2)] == [41, 41]
    assert transcript.tokens["p", 0] == greedy(PROMPT, 30)


# --- compiling


class SlowCompiler:
    """Compiles when it is told to."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self.may_go_on = threading.Event()
        self.num_loads = 0

    def compile(self, grammar: Grammar) -> Matcher:
        assert self.may_go_on.wait(30)
        if grammar.source == "fault":
            raise RuntimeError("a secret path")
        return self._compiler.compile(grammar)

    def load(self) -> None:
        self.num_loads += 1


@pytest.fixture
def slow(compiler: Compiler) -> SlowCompiler:
    return SlowCompiler(compiler)


def collect(engine: Engine) -> Transcript:
    transcript = Transcript()
    while engine.has_work or engine.is_compiling:
        transcript.add(engine.step())
        engine.check_integrity()
    return transcript


def test_others_go_on_while_a_grammar_compiles(make_engine: EngineMaker, slow: SlowCompiler) -> None:
    engine = make_engine(grammars=slow)
    engine.submit(make_request("r", PROMPT, 9, grammar=regex("ab"), stop=[END], n=2))
    plain = run_all(engine, make_request("p", PROMPT, 20))
    assert plain.tokens == {("p", 0): greedy(PROMPT, 20)}
    assert engine.is_compiling
    assert not engine.has_work
    assert engine.stats.num_waiting == 2
    slow.may_go_on.set()
    transcript = collect(engine)
    assert spell(transcript.tokens["r", 0]) == spell(transcript.tokens["r", 1]) == "ab"
    assert engine.stats.num_waiting == 0


def test_abort_while_a_grammar_compiles(make_engine: EngineMaker, slow: SlowCompiler) -> None:
    engine = make_engine(grammars=slow)
    for name in ("whole", "by one", "part"):
        engine.submit(make_request(name, PROMPT, 9, grammar=regex("ab"), stop=[END], n=2))
    engine.abort("whole")
    for sample in (0, 1, 1, 7):
        engine.abort("by one", sample)
    for _ in range(2):
        engine.abort("part", 0)
    transcript = Transcript()
    while engine.has_work:
        transcript.add(engine.step())
    assert {key for key, end in transcript.ends.items() if end.finish_reason is FinishReason.ABORT} == {
        ("whole", 0),
        ("whole", 1),
        ("by one", 0),
        ("by one", 1),
        ("part", 0),
    }
    assert engine.stats.num_waiting == 1
    slow.may_go_on.set()
    rest = collect(engine)
    # the scheduler tells of the end of a sample once more, which the client side no longer knows
    assert spell(rest.tokens["part", 1]) == "ab"
    assert ("part", 0) not in rest.tokens
    assert engine.stats.num_slots_used == 0


def test_a_grammar_that_cannot_be_compiled_fails_its_request_alone(
    make_engine: EngineMaker, slow: SlowCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    slow.may_go_on.set()
    engine = make_engine(grammars=slow)
    bad = make_request("bad", PROMPT, 9, grammar=regex("(?=a)"), n=2)
    odd = make_request("odd", PROMPT, 9, grammar=regex("fault"))
    endless = make_request("endless", PROMPT, 9, grammar=Grammar("grammar", "root ::= root"))
    transcript = run(engine, bad, odd, endless, make_request("p", PROMPT, 9))
    assert transcript.tokens == {("p", 0): greedy(PROMPT, 9)}
    assert transcript.reason("bad", 0) is transcript.reason("bad", 1) is FinishReason.INVALID
    assert "look-around" in (transcript.ends["bad", 1].error or "")
    assert transcript.ends["odd", 0].error == "the grammar cannot be used (RuntimeError)"
    assert "the grammar cannot be used" in (transcript.ends["endless", 0].error or "")
    assert "a grammar could not be compiled" in caplog.text


def test_a_request_that_can_never_run_is_refused_before_its_grammar_is_compiled(
    make_engine: EngineMaker, slow: SlowCompiler
) -> None:
    engine = make_engine(num_slots=2, grammars=slow)
    with pytest.raises(RequestRefused, match="n = 3"):
        engine.submit(make_request("r", PROMPT, 9, grammar=regex("a"), n=3))
    engine.submit(make_request("r", PROMPT, 9, grammar=regex("a")))
    with pytest.raises(RequestRefused, match="live already"):
        engine.submit(make_request("r", PROMPT, 9, grammar=regex("a")))
    with pytest.raises(RequestRefused, match="live already"):
        engine.submit(make_request("r", PROMPT, 9))
    slow.may_go_on.set()
    collect(engine)


def test_without_a_tokenizer_grammars_are_refused(make_engine: EngineMaker, tmp_path: Path) -> None:
    with pytest.raises(RequestRefused, match="no tokenizer"):
        make_engine(grammars=None).submit(make_request(grammar=regex("a")))
    transcript = run(make_engine(grammars=Compiler(tmp_path, VOCAB_SIZE, [END])), make_request(grammar=regex("a")))
    assert "no tokenizer.json" in (transcript.ends["r", 0].error or "")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    transcript = run(make_engine(grammars=Compiler(tmp_path, VOCAB_SIZE, [END])), make_request(grammar=regex("a")))
    assert transcript.ends["r", 0].error == "structured output is not possible with this model's tokenizer"
    with pytest.raises(GrammarError, match="no tokenizer.json"):
        Compiler("no/such-tokenizer", VOCAB_SIZE, [END]).load()


def test_the_tokenizer_is_read_once_there_has_been_no_work_for_a_while(
    make_engine: EngineMaker, slow: SlowCompiler
) -> None:
    engine = make_engine(grammars=slow)
    while engine.prepare_more():
        pass
    for _ in range(2):
        engine.prepare_more()
    run_all(engine, make_request("p", PROMPT, 2))
    for _ in range(4):
        engine.prepare_more()
    assert slow.num_loads == 0
    for _ in range(5):
        engine.prepare_more()
    deadline = time.monotonic() + 30
    while slow.num_loads == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert slow.num_loads == 1


def test_compiled_grammars_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make_compiler(tmp_path)
    made: list[Grammar] = []
    compile_anew = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda grammar: made.append(grammar) or compile_anew(grammar))
    monkeypatch.setattr("app.engine.matchers.MAX_KEPT", 2)
    for source in ("a1", "b1", "a1", "c1", "a1", "b1"):
        compiler.compile(regex(source))
    assert [grammar.source for grammar in made] == ["a1", "b1", "c1", "b1"]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8, 20])
def test_a_new_engine_goes_on_where_one_died(make_engine: EngineMaker, num_steps: int) -> None:
    requests = [*crowd(), make_request("scored", [4] * 30, 5, prompt_logprobs=1, logprobs=0, n=2)]
    expected = run(make_engine(16), *requests)
    dying = make_engine(16)
    told = Transcript()
    for request in requests:
        dying.submit(request)
    while dying.is_compiling and num_steps:
        told.add(dying.step())
        time.sleep(0.001)
    for _ in range(num_steps):
        told.add(dying.step())
    rest = run(make_engine(16), *(request for one in requests if (request := taken_up(one, told)) is not None))
    for key, tokens in expected.tokens.items():
        assert told.tokens.get(key, []) + rest.tokens.get(key, []) == tokens, key
    ends = told.ends | rest.ends
    assert {key: end.finish_reason for key, end in ends.items()} == {
        key: end.finish_reason for key, end in expected.ends.items()
    }
    scores, whole = (
        [one for part in parts for piece in part.prompt_slices.get("scored", []) for one in piece.logprobs]
        for parts in ((told, rest), (expected,))
    )
    assert scores == whole
