"""Requests in, events out: ends, aborts, log-probabilities, and what a failing step does to whom."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch

from app.engine.adjustments import AdjustedRows, Adjuster
from app.engine.engine import MAX_JOINT_FAILURES, Engine, RequestRefused
from app.engine.request import FinishReason, GenerationRequest, SamplingParams
from app.engine.sequence import StepPlan
from mamba_core import MambaCache
from tests.engine import fakes
from tests.engine.fakes import (
    MODES,
    VOCAB_SIZE,
    Transcript,
    greedy,
    logits_of,
    make_request,
    run,
    state_after,
)

PROMPT = (5, 17, 2, 44, 8, 1, 30, 9, 9, 21, 3, 50)

EngineMaker = Callable[..., Engine]


@pytest.fixture(params=[*MODES, "uniform"])
def make_engine(request: pytest.FixtureRequest) -> EngineMaker:
    """Every test of this module holds whether steps overlap or not."""
    return partial(fakes.make_engine, mode=request.param)


def prompts(count: int) -> list[list[int]]:
    source = random.Random(7)
    return [[source.randrange(VOCAB_SIZE) for _ in range(source.randint(1, 30))] for _ in range(count)]


@pytest.mark.parametrize("prefill_budget", [1, 3, 11, 100])
def test_greedy_tokens_are_those_of_the_model(make_engine: EngineMaker, prefill_budget: int) -> None:
    transcript = run(make_engine(prefill_budget=prefill_budget), make_request(prompt=PROMPT, max_tokens=9))
    assert transcript.tokens["r", 0] == greedy(PROMPT, 9)
    assert transcript.reason("r") is FinishReason.LENGTH


def test_many_requests_on_few_slots_each_get_their_own_tokens(make_engine: EngineMaker) -> None:
    all_prompts = prompts(40)
    requests = [make_request(f"r{i}", prompt, 1 + i % 7) for i, prompt in enumerate(all_prompts)]
    engine = make_engine(num_slots=3, prefill_budget=5)
    transcript = run(engine, *requests)
    for i, prompt in enumerate(all_prompts):
        assert transcript.tokens[f"r{i}", 0] == greedy(prompt, 1 + i % 7)
    assert engine.stats.num_decode_tokens == sum(1 + i % 7 for i in range(40))
    assert engine.stats.num_prefill_tokens == sum(len(prompt) - 1 for prompt in all_prompts)
    assert (engine.stats.num_running, engine.stats.num_slots_used, engine.stats.num_waiting) == (0, 0, 0)


def test_a_stop_token_ends_and_is_delivered(make_engine: EngineMaker) -> None:
    expected = greedy(PROMPT, 9)
    stop = expected[4]
    first = expected.index(stop)
    transcript = run(make_engine(), make_request(prompt=PROMPT, max_tokens=9, stop=(52, stop)))
    assert transcript.tokens["r", 0] == expected[: first + 1]
    end = transcript.ends["r", 0]
    assert (end.finish_reason, end.stop_reason, end.token_id) == (FinishReason.STOP, stop, stop)


def test_greedy_samples_of_one_request_are_equal(make_engine: EngineMaker) -> None:
    transcript = run(make_engine(prefill_budget=4), make_request(prompt=PROMPT, n=4))
    assert [transcript.tokens["r", sample] for sample in range(4)] == [greedy(PROMPT, 4)] * 4


def test_random_samples_of_one_request_differ_and_are_repeatable(make_engine: EngineMaker) -> None:
    request = make_request(prompt=PROMPT, n=4, temperature=1.0, seed=3, max_tokens=12)
    first, second = run(make_engine(), request), run(make_engine(), request)
    assert first.tokens == second.tokens
    assert len({tuple(tokens) for tokens in first.tokens.values()}) == 4


def test_a_seeded_request_draws_the_same_alone_and_in_company(make_engine: EngineMaker) -> None:
    request = make_request("seeded", PROMPT, 12, temperature=0.9, top_p=0.95, seed=11)
    company = [
        make_request(f"r{i}", prompt, 15, temperature=i % 3 / 2, top_k=i % 4, seed=i)
        for i, prompt in enumerate(prompts(9))
    ]
    alone = run(make_engine(), request)
    together = run(make_engine(), *company[:4], request, *company[4:])
    assert together.tokens["seeded", 0] == alone.tokens["seeded", 0]


def test_a_request_resumed_with_its_own_tokens_goes_on_as_it_would_have(make_engine: EngineMaker) -> None:
    whole = run(make_engine(), make_request(prompt=PROMPT, max_tokens=12, temperature=1.0, seed=4)).tokens["r", 0]
    resumed = make_request(prompt=[*PROMPT, *whole[:5]], max_tokens=7, temperature=1.0, seed=4)
    assert run(make_engine(), resumed).tokens["r", 0] == whole[5:]


@pytest.mark.parametrize("prefill_budget", [2, 5, 100])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_logprobs_are_those_of_every_position_but_the_first(
    make_engine: EngineMaker, prefill_budget: int, max_tokens: int
) -> None:
    engine = make_engine(prefill_budget=prefill_budget)
    other = make_request("other", PROMPT[::-1], 5)
    transcript = run(engine, other, make_request(prompt=PROMPT, max_tokens=max_tokens, prompt_logprobs=3))
    slices = transcript.prompt_slices["r"]
    assert [piece.start for piece in slices] == [
        1 + sum(len(piece.logprobs) for piece in slices[:index]) for index in range(len(slices))
    ]
    records = [record for piece in slices for record in piece.logprobs]
    assert len(records) == len(PROMPT) - 1
    for position, record in enumerate(records, start=1):
        expected = logits_of(state_after(PROMPT[:position])).log_softmax(-1)
        assert record.logprob == pytest.approx(expected[PROMPT[position]].item(), abs=1e-5)
        top = expected.topk(3)
        assert [token for token, _ in record.top] == top.indices.tolist()
        assert [value for _, value in record.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert transcript.reason("r") is FinishReason.LENGTH
    assert len(transcript.tokens.get(("r", 0), [])) == max_tokens
    assert set(transcript.prompt_slices) == {"r"}


def test_a_prompt_of_one_token_has_no_prompt_logprobs(make_engine: EngineMaker) -> None:
    transcript = run(make_engine(), make_request(prompt=[4], max_tokens=0, prompt_logprobs=2))
    assert transcript.prompt_slices == {}
    assert transcript.reason("r") is FinishReason.LENGTH


def test_logprobs_are_of_the_raw_distribution_and_only_for_rows_that_ask(make_engine: EngineMaker) -> None:
    bias = ((7, 4.0),)
    asking = make_request("asks", PROMPT, 5, temperature=0.7, top_k=3, seed=1, logprobs=2, logit_bias=bias)
    transcript = run(
        make_engine(), asking, make_request("silent", PROMPT, 5), make_request("one", PROMPT, 5, logprobs=0)
    )
    tokens = list(PROMPT)
    for event in transcript.events["asks", 0]:
        expected = logits_of(state_after(tokens)).log_softmax(-1)
        assert event.logprobs is not None
        assert event.token_id is not None
        assert event.logprobs.logprob == pytest.approx(expected[event.token_id].item(), abs=1e-5)
        assert [token for token, _ in event.logprobs.top] == expected.topk(2).indices.tolist()
        tokens.append(event.token_id)
    assert all(event.logprobs is None for event in transcript.events["silent", 0])
    assert all(event.logprobs is not None and event.logprobs.top == () for event in transcript.events["one", 0])


@pytest.mark.parametrize("num_steps", range(8))
def test_abort_in_any_phase_ends_within_a_step_and_leaves_the_slot_clean(
    make_engine: EngineMaker, num_steps: int
) -> None:
    engine = make_engine(num_slots=1, prefill_budget=3)
    engine.submit(make_request("first", PROMPT, 3))
    engine.submit(make_request("gone", PROMPT, 9))
    for _ in range(num_steps):
        engine.step()
    for name in ("first", "gone"):
        engine.abort(name)
    transcript = Transcript()
    transcript.add(engine.step())
    engine.check_integrity()
    assert transcript.reason("gone") is FinishReason.ABORT
    assert not engine.has_work
    assert run(engine, make_request("next", PROMPT[:5], 6)).tokens["next", 0] == greedy(PROMPT[:5], 6)


def test_abort_of_one_sample_leaves_the_others(make_engine: EngineMaker) -> None:
    engine = make_engine(prefill_budget=3)
    engine.submit(make_request(prompt=PROMPT, n=3, max_tokens=6))
    engine.step()
    engine.abort("r", 0)
    transcript = run(engine)
    assert transcript.reason("r", 0) is FinishReason.ABORT
    assert [transcript.tokens["r", sample] for sample in (1, 2)] == [greedy(PROMPT, 6)] * 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(prompt=[1, VOCAB_SIZE]), "outside the vocabulary"),
        (make_request(prompt=[1, -1]), "outside the vocabulary"),
        (make_request(prompt=[]), "empty"),
        (make_request(n=5), "n = 5"),
        (make_request(logit_bias=((VOCAB_SIZE, 1.0),)), "logit_bias"),
    ],
)
def test_a_request_that_can_never_run_is_refused(
    make_engine: EngineMaker, request_: GenerationRequest, message: str
) -> None:
    engine = make_engine(num_slots=4)
    with pytest.raises(RequestRefused, match=message):
        engine.submit(request_)
    assert not engine.has_work


def poison(request_id: str, at_token: int) -> object:
    """Writes NaN into the state of a request once it has drawn so many tokens."""
    num_drawn = itertools.count()

    def before_step(plan: StepPlan, cache: MambaCache) -> None:
        for sequence in plan.rows:
            if sequence.request.request_id == request_id and next(num_drawn) == at_token:
                cache.ssm[:, sequence.slot] = math.nan

    return before_step


def test_a_row_of_nan_ends_alone_and_its_slot_is_clean_for_the_next(make_engine: EngineMaker) -> None:
    all_prompts = prompts(6)
    engine = make_engine(num_slots=3, before_step=poison("r1", 2))  # type: ignore[arg-type]
    transcript = run(engine, *[make_request(f"r{i}", prompt, 5) for i, prompt in enumerate(all_prompts)])
    assert transcript.reason("r1") is FinishReason.ERROR
    assert "NaN" in str(transcript.ends["r1", 0].error)
    assert transcript.tokens["r1", 0] == greedy(all_prompts[1], 2)
    for i in (0, 2, 3, 4, 5):
        assert transcript.tokens[f"r{i}", 0] == greedy(all_prompts[i], 5)


def test_prompt_logprobs_of_nan_end_the_request(make_engine: EngineMaker) -> None:
    def before_step(plan: StepPlan, cache: MambaCache) -> None:
        for chunk in plan.chunks:
            if chunk.start > 0:
                cache.ssm[:, chunk.prefill.slot] = math.nan

    engine = make_engine(prefill_budget=6, before_step=before_step)
    transcript = run(engine, make_request(prompt=PROMPT, n=2, prompt_logprobs=0))
    assert [transcript.reason("r", sample) for sample in (0, 1)] == [FinishReason.ERROR] * 2
    assert len(transcript.prompt_slices["r"]) == 1


class Fault(Exception):
    """Planted by a test."""


def raise_for(request_id: str, at_token: int = 2) -> object:
    def before_step(plan: StepPlan, _: MambaCache) -> None:
        for sequence in plan.rows:
            if sequence.request.request_id == request_id and len(sequence.output) >= at_token:
                raise Fault

    return before_step


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_breaks_its_step_fails_alone(make_engine: EngineMaker, temperature: float) -> None:
    requests = [
        make_request(f"r{i}", prompt, 8, temperature=temperature, seed=i, presence_penalty=0.5)
        for i, prompt in enumerate(prompts(8))
    ]
    undisturbed = run(make_engine(num_slots=5), *requests)
    engine = make_engine(num_slots=5, before_step=raise_for("r3"))  # type: ignore[arg-type]
    transcript = run(engine, *requests)
    end = transcript.ends["r3", 0]
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, "the engine failed on this request (Fault)")
    for i in (0, 1, 2, 4, 5, 6, 7):
        assert transcript.tokens[f"r{i}", 0] == undisturbed.tokens[f"r{i}", 0]
    assert transcript.tokens["r3", 0] == undisturbed.tokens["r3", 0][:2]


def test_a_fault_that_passes_hurts_nobody(make_engine: EngineMaker) -> None:
    joint_steps = iter(range(1000))

    def before_step(plan: StepPlan, cache: MambaCache) -> None:
        if len({sequence.request.request_id for sequence in plan.members}) > 1 and next(joint_steps) in (1, 3):
            cache.ssm[:] = 1234.0
            raise Fault

    requests = [
        make_request(f"r{i}", prompt, 6, n=1 + i % 2, prompt_logprobs=1 if i == 2 else None)
        for i, prompt in enumerate(prompts(5))
    ]
    calm, shaken = run(make_engine(), *requests), run(make_engine(before_step=before_step), *requests)
    assert shaken.tokens == calm.tokens
    joined = [[record for piece in t.prompt_slices["r2"] for record in piece.logprobs] for t in (calm, shaken)]
    assert joined[0] == joined[1]


def test_a_fault_in_the_middle_of_a_prompt_repeats_no_logprobs(make_engine: EngineMaker) -> None:
    faults = iter([False, False, True])

    def before_step(plan: StepPlan, _: MambaCache) -> None:
        if len(plan.members) > 1 and next(faults, False):
            raise Fault

    requests = [make_request("short", PROMPT[:2], 30), make_request("long", PROMPT * 3, 2, prompt_logprobs=1)]
    calm = run(make_engine(prefill_budget=6), *requests)
    shaken = run(make_engine(prefill_budget=6, before_step=before_step), *requests)
    records = [[record for piece in t.prompt_slices["long"] for record in piece.logprobs] for t in (calm, shaken)]
    assert records[0] == records[1]
    position = 1
    for piece in shaken.prompt_slices["long"]:
        assert piece.start == position
        position += len(piece.logprobs)
    assert shaken.tokens == calm.tokens


def test_what_a_failed_step_has_counted_is_forgotten(make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        make_request(f"r{i}", prompt, 12, frequency_penalty=2.0, temperature=i % 2, seed=i)
        for i, prompt in enumerate(prompts(4))
    ]
    calm = run(make_engine(), *requests)
    count, counts = Adjuster.count, iter(range(1000))

    def count_and_fail(adjuster: Adjuster, tokens: torch.Tensor, adjusted: AdjustedRows) -> None:
        count(adjuster, tokens, adjusted)
        if next(counts) == 5:
            raise Fault

    monkeypatch.setattr(Adjuster, "count", count_and_fail)
    assert run(make_engine(), *requests).tokens == calm.tokens
    assert next(counts) > 6


def test_steps_that_fail_only_together_are_given_up_after_a_while(make_engine: EngineMaker) -> None:
    failures = []

    def before_step(plan: StepPlan, _: MambaCache) -> None:
        if len(plan.rows) > 1:
            failures.append(plan)
            raise Fault

    engine = make_engine(before_step=before_step)
    transcript = run(engine, make_request("a", PROMPT, 50), make_request("b", PROMPT, 50))
    assert [transcript.reason(name) for name in "ab"] == [FinishReason.ERROR] * 2
    assert len(failures) == MAX_JOINT_FAILURES + 1
    assert run(engine, make_request("c", PROMPT, 3)).tokens["c", 0] == greedy(PROMPT, 3)


def test_a_device_that_is_gone_is_not_survived(make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def before_step(_: StepPlan, __: MambaCache) -> None:
        raise Fault

    def probe() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine = make_engine(before_step=before_step)
    monkeypatch.setattr(engine._runner, "probe", probe)
    engine.submit(make_request())
    with pytest.raises(RuntimeError, match="device-side"):
        engine.step()


def test_out_of_memory_in_a_large_batch_keeps_the_engine_alive(make_engine: EngineMaker) -> None:
    def before_step(plan: StepPlan, _: MambaCache) -> None:
        if plan.num_prefill_tokens > 20:
            raise torch.OutOfMemoryError("planted")

    engine = make_engine(prefill_budget=30, before_step=before_step)
    transcript = run(engine, *[make_request(f"r{i}", PROMPT, 4) for i in range(4)])
    assert [transcript.tokens[f"r{i}", 0] for i in range(4)] == [greedy(PROMPT, 4)] * 4


def test_ten_thousand_aborts_leak_nothing(make_engine: EngineMaker) -> None:
    engine: Engine = make_engine(num_slots=4, prefill_budget=6)
    source = random.Random(1)
    for i in range(10_000):
        engine.submit(
            GenerationRequest(f"r{i}", (1, 2, 3, 4), SamplingParams(temperature=0), 5, n=source.randint(1, 3))
        )
        if source.random() < 0.5:
            engine.step()
        engine.abort(f"r{i - source.randint(0, 2)}")
    engine.check_integrity()
    run(engine)
    assert (engine.stats.num_slots_used, engine.stats.num_waiting) == (0, 0)
    assert run(engine, make_request("last", PROMPT)).tokens["last", 0] == greedy(PROMPT, 4)


def random_requests(source: random.Random, count: int) -> list[GenerationRequest]:
    """Prompts, samples, limits, stop tokens and ways of drawing of all kinds."""
    return [
        make_request(
            f"r{i}",
            [source.randrange(VOCAB_SIZE) for _ in range(source.randint(1, 20))],
            source.choice([0, 1, 2, 3, 8, 15]),
            n=source.choice([1, 1, 1, 2, 4]),
            stop=source.sample(range(VOCAB_SIZE), source.choice([0, 3, 10])),
            temperature=source.choice([0.0, 1.0]),
            seed=i,
            presence_penalty=source.choice([0.0, 0.0, 0.7]),
            logit_bias=source.choice([(), (), ((5, 2.0),)]),
            logprobs=source.choice([None, None, 1]),
            prompt_logprobs=source.choice([None, None, 1]),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_any_interleaving_of_arrivals_ends_and_faults_gives_the_tokens_of_each_alone(
    make_engine: EngineMaker, seed: int
) -> None:
    source = random.Random(seed)
    requests = random_requests(source, 40)
    alone = Transcript()
    for request in requests:
        one = run(fakes.make_engine(), request)
        alone.tokens |= one.tokens
        alone.ends |= one.ends

    def before_step(plan: StepPlan, cache: MambaCache) -> None:
        slots = [sequence.slot for sequence in plan.rows]
        assert len(set(slots)) == len(slots)
        assert 0 not in slots
        if not plan.is_solo and source.random() < 0.03:
            cache.ssm[:] = 1234.0
            raise Fault

    engine = make_engine(before_step=before_step, prefill_budget=source.choice([3, 8, 40]))
    transcript, waiting = Transcript(), list(requests)
    while waiting or engine.has_work:
        for request in waiting[: source.choice([0, 0, 1, 3])]:
            engine.submit(request)
            waiting.remove(request)
        if source.random() < 0.1:
            engine.abort(f"r{source.randrange(40)}", source.choice([None, 0, 1]))
        transcript.add(engine.step())
        engine.check_integrity()
    assert transcript.ends.keys() == alone.ends.keys()
    for key, end in transcript.ends.items():
        tokens, expected = transcript.tokens.get(key, []), alone.tokens.get(key, [])
        if end.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, end.finish_reason) == (expected, alone.ends[key].finish_reason)
    assert engine.stats.num_slots_used == 0


def test_a_step_that_is_launched_is_read_before_the_engine_has_no_work(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.submit(make_request("a", PROMPT[:3], 50))
    for _ in range(4):
        engine.step()
    engine.abort("a")
    while engine.has_work:
        engine.step()
    assert engine._in_flight is None
