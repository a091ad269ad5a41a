"""A real tiny model: tokens do not depend on batch mates, on chunks or on who held the slot before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from app.engine import runner as runner_module
from app.engine.engine import Engine
from app.engine.request import GenerationRequest
from mamba_core import FalconMambaConfig, FalconMambaForCausalLM, MambaCache, MambaConfig, MambaForCausalLM
from tests.engine.fakes import CHUNK_SHAPES, MODES, WITH_GRAPHS, Transcript, make_request, make_runner, run

VOCAB_SIZE = 97
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

EngineMaker = Callable[..., Engine]


@pytest.fixture(scope="module", params=["mamba", "falcon_mamba"])
def model(request: pytest.FixtureRequest) -> MambaForCausalLM:
    torch.manual_seed(1)
    if request.param == "mamba":
        made = MambaForCausalLM(MambaConfig(**SIZES))
    else:
        made = FalconMambaForCausalLM(FalconMambaConfig(**SIZES))
    # far from the initial symmetry, so that tokens vary
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_engine(model: MambaForCausalLM, mode: str) -> EngineMaker:
    def make(num_slots: int = 8, prefill_budget: int = 64) -> Engine:
        cache = MambaCache.from_config(model.config, num_slots + 1, dtype=torch.float32)
        # what is read without having been written must show
        cache.conv.fill_(torch.nan)
        cache.ssm.fill_(torch.nan)
        runner = make_runner(mode, model, cache, VOCAB_SIZE)
        return Engine(runner, num_slots=num_slots, vocab_size=VOCAB_SIZE, prefill_budget=prefill_budget)

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def crowd(count: int = 12) -> list[GenerationRequest]:
    return [
        make_request(
            f"r{i}",
            prompt(1 + (7 * i) % 40, i),
            4 + i % 9,
            temperature=(0.0, 0.0, 1.0)[i % 3],
            seed=i,
            top_p=0.9 if i % 2 else 1.0,
            repetition_penalty=1.2 if i % 4 == 0 else 1.0,
        )
        for i in range(count)
    ]


def assert_same(first: Transcript, second: Transcript) -> None:
    assert first.tokens == second.tokens
    assert {key: end.finish_reason for key, end in first.ends.items()} == {
        key: end.finish_reason for key, end in second.ends.items()
    }


def test_greedy_tokens_are_those_of_generate(model: MambaForCausalLM, make_engine: EngineMaker) -> None:
    requests = [make_request(f"r{i}", prompt(1 + 9 * i, i), 20) for i in range(4)]
    transcript = run(make_engine(), *requests)
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert transcript.tokens[request.request_id, 0] == expected[0, ids.shape[1] :].tolist()


def test_tokens_do_not_depend_on_batch_mates(make_engine: EngineMaker) -> None:
    together = run(make_engine(), *crowd())
    alone = Transcript()
    for request in crowd():
        one = run(make_engine(), request)
        alone.tokens |= one.tokens
        alone.ends |= one.ends
    assert_same(together, alone)


@pytest.mark.parametrize("prefill_budget", [1, 7, 33])
def test_a_prompt_in_chunks_is_the_prompt_as_a_whole(make_engine: EngineMaker, prefill_budget: int) -> None:
    assert_same(
        run(make_engine(prefill_budget=prefill_budget), *crowd()), run(make_engine(prefill_budget=512), *crowd())
    )


def test_tokens_do_not_depend_on_who_held_the_slot_before(make_engine: EngineMaker) -> None:
    engine = make_engine(num_slots=2, prefill_budget=16)
    run(engine, *crowd(8))
    for name in "ab":
        engine.submit(make_request(name, prompt(30), 100))
    for _ in range(4):
        engine.step()
    for name in "ab":
        engine.abort(name)
    engine.step()
    request = make_request("next", prompt(25, 9), 12, n=2, temperature=0.8, seed=3)
    assert_same(run(engine, request), run(make_engine(), request))


def test_a_fork_goes_on_where_its_source_stands(make_engine: EngineMaker) -> None:
    forked = run(make_engine(prefill_budget=8), make_request("n", prompt(20), 10, n=5, temperature=1.0, seed=6))
    engine = make_engine()
    for sample in range(5):
        assert forked.tokens["n", sample] != forked.tokens["n", (sample + 1) % 5]
    single = run(engine, make_request("n", prompt(20), 10, temperature=1.0, seed=6))
    assert single.tokens["n", 0] == forked.tokens["n", 0]
    greedy = run(make_engine(), make_request("g", prompt(20), 10, n=3))
    assert greedy.tokens["g", 0] == greedy.tokens["g", 1] == greedy.tokens["g", 2]


@pytest.mark.parametrize("prefill_budget", [5, 13, 512])
def test_prompt_logprobs_are_those_of_the_dense_forward(
    model: MambaForCausalLM, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, prefill_budget: int
) -> None:
    monkeypatch.setattr(runner_module, "LOGPROB_SLICE", 6)
    ids = prompt(41)
    transcript = run(
        make_engine(prefill_budget=prefill_budget),
        make_request("other", prompt(30, 4), 3),
        make_request("r", ids, 2, prompt_logprobs=4),
    )
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    records = [record for piece in transcript.prompt_slices["r"] for record in piece.logprobs]
    assert len(records) == 40
    for position, record in enumerate(records, start=1):
        row = expected[position - 1]
        assert record.logprob == pytest.approx(row[ids[position]].item(), abs=1e-4)
        assert [value for _, value in record.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_logits_of_prompt_positions_exist_only_in_slices(
    model: MambaForCausalLM, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    compute_logits = model.compute_logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0])
        return compute_logits(hidden)

    engine = make_engine(prefill_budget=1024)
    monkeypatch.setattr(model, "compute_logits", watched)
    run(engine, make_request("quiet", prompt(700), 1))
    assert sizes == [1]
    run(engine, make_request("r", prompt(700), 0, prompt_logprobs=0))
    assert sizes[1:] == [256, 256, 187]


def watch_forwards(model: MambaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of tokens of each forward pass."""
    sizes: list[int] = []
    forward = model.forward_packed

    def watched(tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        return forward(tokens, *args)

    monkeypatch.setattr(model, "forward_packed", watched)
    return sizes


@pytest.mark.parametrize(("length", "passes"), [(20, [20, 1, 1]), (8, [8, 1, 1]), (2, [2, 1, 1]), (1, [1, 1, 1])])
def test_the_last_token_of_a_prompt_goes_along_with_its_chunk(
    make_engine: EngineMaker,
    model: MambaForCausalLM,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    passes: list[int],
) -> None:
    sizes = watch_forwards(model, monkeypatch)
    engine = make_engine()
    del sizes[:]
    run(engine, make_request("a", prompt(length), 3))
    if mode in WITH_GRAPHS and length > 1:
        passes = [next(shape.num_tokens for shape in CHUNK_SHAPES if shape.num_tokens >= length), *passes[1:]]
    assert sizes == passes


def test_a_last_token_for_which_a_graph_has_no_room_is_left_to_decode(
    make_engine: EngineMaker, model: MambaForCausalLM, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = watch_forwards(model, monkeypatch)
    engine = make_engine(prefill_budget=512)
    del sizes[:]
    alone = run(engine, make_request("a", prompt(129), 3))
    assert sizes == ([128, 1, 1, 1] if mode in WITH_GRAPHS else [129, 1, 1])
    assert alone.tokens == run(make_engine(prefill_budget=17), make_request("a", prompt(129), 3)).tokens


def test_beside_rows_that_run_a_last_token_is_left_to_decode(
    make_engine: EngineMaker, model: MambaForCausalLM, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.submit(make_request("a", prompt(5), 20))
    for _ in range(3):
        engine.step()
    sizes = watch_forwards(model, monkeypatch)
    engine.submit(make_request("b", prompt(32, 1), 2))
    engine.step()
    assert sizes == [32 if mode in WITH_GRAPHS else 31, 2]


def test_a_burst_starts_as_its_prompts_do_alone(make_engine: EngineMaker) -> None:
    requests = [make_request(f"r{i}", prompt(2 + 3 * i, i), 5, n=1 + i % 2, logprobs=2) for i in range(4)]
    together = run(make_engine(), *requests)
    for request in requests:
        alone = run(make_engine(), request)
        for sample in range(request.n):
            key = (request.request_id, sample)
            assert together.tokens[key] == alone.tokens[key]
            first, other = (transcript.events[key][0].logprobs for transcript in (together, alone))
            assert first is not None
            assert other is not None
            assert first.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("mode", ["synchronous", "overlapped"])
def test_scratch_is_never_touched_without_padding(make_engine: EngineMaker) -> None:
    engine = make_engine()
    run(engine, *crowd())
    cache = engine._runner.cache
    assert cache.ssm[:, 0].isnan().all()
    assert cache.conv[:, 0].isnan().all()
