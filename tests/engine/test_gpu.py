"""On a GPU: the same uniforms to the bit, the same draws, and the tokens that the CPU gives, with graphs or without."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from app.engine import distribution
from app.engine.chunk_graphs import ChunkGraphs
from app.engine.chunks import PackedChunks
from app.engine.cuda import cuda_runner
from app.engine.engine import Engine
from app.engine.host import DeviceOutbox, Mark
from app.engine.memory import choose_max_num_seqs
from app.engine.request import FinishReason, GenerationRequest
from app.engine.runner import Runner
from app.engine.sampler import Sampler
from app.engine.sequence import Sequence, StepPlan
from mamba_core import MambaCache, MambaConfig, MambaForCausalLM
from tests.engine.fakes import Transcript, make_request, run

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
VOCAB_SIZE = 97


def test_uniforms_have_the_same_bits() -> None:
    keys = torch.tensor([distribution.stream_key(seed, seed % 7) for seed in range(-2000, 2000)])
    positions = torch.arange(4000) * 977
    on_cpu = distribution.uniforms(keys, positions)
    assert torch.equal(distribution.uniforms(keys.to(GPU), positions.to(GPU)).cpu(), on_cpu)


def test_the_same_logits_draw_the_same_tokens() -> None:
    logits = torch.randn(200, 50280, generator=torch.Generator().manual_seed(0)) * 3
    rows = []
    for i in range(200):
        request = make_request(
            f"r{i}",
            [1, 2, i],
            50,
            temperature=(0.0, 0.7, 1.0, 1.5)[i % 4],
            top_k=(0, 0, 40)[i % 3],
            top_p=(1.0, 0.9, 1.0, 0.99, 0.5)[i % 5],
            min_p=(0.0, 0.0, 0.05)[i // 7 % 3],
            repetition_penalty=(1.0, 1.2)[i // 3 % 2],
            presence_penalty=(0.0, 0.5)[i // 5 % 2],
            logit_bias=((), ((7, 5.0), (50279, -3.0)))[i // 11 % 2],
            seed=i,
            logprobs=(None, 3)[i % 2],
        )
        rows.append(Sequence(request, 0, frozenset(), i, 1 + i, [5, 7, i]))
    drawn = []
    for device in (torch.device("cpu"), GPU):
        sampler = Sampler(201, 50280, device)
        drawn.append(sampler.draw(logits.to(device, copy=True), sampler.prepare(tuple(rows))))
    on_cpu, on_gpu = drawn
    # a uniform that falls within rounding of a boundary may choose the neighbour: expected 0.001 times in 200 rows
    assert torch.equal(on_gpu.tokens.cpu(), on_cpu.tokens)
    assert on_gpu.logprobs is not None
    assert on_cpu.logprobs is not None
    assert torch.allclose(on_gpu.logprobs[:, :4].cpu(), on_cpu.logprobs[:, :4], atol=1e-4)


def make_runner(model: MambaForCausalLM, num_slots: int, mode: str) -> Runner:
    """On the CPU; or on the GPU with a launch per operation and torch's sampler, with one and the fused sampler, or
    with graphs.
    """
    device = torch.device("cpu") if mode == "cpu" else GPU
    cache = MambaCache.from_config(model.config, num_slots + 1, dtype=torch.float32, device=device)
    cache.ssm.fill_(torch.nan)
    cache.conv.fill_(torch.nan)
    model = model.to(device)
    if mode in ("fused", "graphs"):
        runner = cuda_runner(model, cache, VOCAB_SIZE, cuda_graphs=mode == "graphs")
    else:
        runner = Runner(model, cache, VOCAB_SIZE)
    runner.start()
    return runner


def make_engine(model: MambaForCausalLM, mode: str = "graphs", num_slots: int = 8, prefill_budget: int = 50) -> Engine:
    runner = make_runner(model, num_slots, mode)
    return Engine(runner, num_slots=num_slots, vocab_size=VOCAB_SIZE, prefill_budget=prefill_budget)


@pytest.fixture
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    made = MambaForCausalLM(MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=3))
    # far from the initial symmetry, so that tokens vary
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.eval()
    return made


def mixed_request(index: int, max_tokens: int = 20) -> GenerationRequest:
    """One of many kinds: greedy, seeded, filtered, penalised, biased, with log-probabilities, one or more samples."""
    return make_request(
        f"r{index}",
        [(7 * index + j) % VOCAB_SIZE for j in range(1 + 9 * index % 61)],
        max_tokens,
        n=1 + index % 3 // 2,
        temperature=(0.0, 0.8, 1.0)[index % 3],
        seed=index,
        top_k=(0, 0, 20, 3)[index % 4],
        top_p=(1.0, 0.9, 1.0, 1.0, 0.7)[index % 5],
        min_p=(0.0, 0.0, 0.05)[index // 7 % 3],
        repetition_penalty=(1.0, 1.0, 1.2)[index // 2 % 3],
        presence_penalty=(0.0, 0.0, 0.0, 0.5)[index // 3 % 4],
        logit_bias=((), (), (), ((7, 3.0), (96, -3.0)))[index // 5 % 4],
        logprobs=(None, None, None, 3)[index % 4],
        prompt_logprobs=(None, 0)[index % 2],
    )


@pytest.mark.parametrize("mode", ["eager", "fused", "graphs"])
def test_an_engine_gives_the_tokens_of_the_cpu(model: MambaForCausalLM, mode: str) -> None:
    requests = [mixed_request(i) for i in range(40)]
    on_cpu = run(make_engine(model, "cpu"), *requests)
    on_gpu = run(make_engine(model, mode), *requests)
    assert on_gpu.tokens == on_cpu.tokens
    assert {end.finish_reason for end in on_gpu.ends.values()} == {FinishReason.LENGTH}
    for key, events in on_cpu.events.items():
        for expected, event in zip(events, on_gpu.events[key], strict=True):
            assert (event.logprobs is None) == (expected.logprobs is None)
            if event.logprobs is not None and expected.logprobs is not None:
                assert event.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-3)


@pytest.mark.parametrize("mode", ["fused", "graphs"])
def test_tokens_that_leave_late_are_not_written_over(
    model: MambaForCausalLM, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    requests = [mixed_request(i) for i in range(5)]
    expected = run(make_engine(model, mode), *requests).tokens
    send = DeviceOutbox.send

    def send_late(self: DeviceOutbox, values: torch.Tensor) -> tuple[torch.Tensor, Mark]:
        with torch.cuda.stream(self._stream):
            # many times as long as a step of this model
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
        return send(self, values)

    monkeypatch.setattr(DeviceOutbox, "send", send_late)
    assert run(make_engine(model, mode), *requests).tokens == expected


def test_any_number_of_rows_gives_the_tokens_of_one_row_and_padding_touches_nobody(model: MambaForCausalLM) -> None:
    engine = make_engine(model, num_slots=23)
    alone: dict[tuple[str, int], list[int]] = {}
    for i in range(23):
        alone |= run(engine, mixed_request(i, 5)).tokens
    # every count of rows from 1 to 23, most of which have no graph of their own, in slots of any order
    for num_rows in range(1, 24):
        names = random.Random(num_rows).sample(range(23), num_rows)
        chosen = [mixed_request(i, 5) for i in names if mixed_request(i).n == 1]
        if chosen:
            assert run(engine, *chosen).tokens == {key: alone[key] for key in alone if key[0] in _names(chosen)}


def test_graphs_captured_later_give_the_same(model: MambaForCausalLM) -> None:
    requests = [mixed_request(i) for i in range(40)]
    expected = run(make_engine(model, "fused", 20), *requests).tokens
    engine = make_engine(model, "graphs", 20)
    for request in requests:
        engine.submit(request)
    transcript = Transcript()
    captured = 0
    while engine.has_work:
        transcript.add(engine.step())
        # while rows are running: capture changes no state but that of the scratch slot
        captured += engine.prepare_more()
    assert transcript.tokens == expected
    assert captured >= 3
    assert not engine.prepare_more()


def watch_replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What graphs take from now on: numbers of tokens and of chunks, in the order of steps."""
    replayed: list[tuple[int, int]] = []
    run_chunks = ChunkGraphs.run

    def watched(graphs: ChunkGraphs, chunks: PackedChunks) -> torch.Tensor | None:
        found = run_chunks(graphs, chunks)
        if found is not None:
            replayed.append((len(chunks.tokens), len(chunks.slots)))
        return found

    monkeypatch.setattr(ChunkGraphs, "run", watched)
    return replayed


def test_chunks_that_have_graphs_give_the_same(model: MambaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[(i * i + 3 * j + j * j // 7) % VOCAB_SIZE for j in range(700 + 13 * i)] for i in range(3)]
    requests = [make_request(f"r{i}", prompt, 8, n=1 + i % 2) for i, prompt in enumerate(prompts)]
    # most steps take one chunk of 128 tokens, some the rest of one prompt and the beginning of the next
    expected = run(make_engine(model, "fused", prefill_budget=128), *requests).tokens
    engine = make_engine(model, prefill_budget=128)
    while engine.prepare_more():
        pass
    replayed = watch_replays(monkeypatch)
    assert run(engine, *requests).tokens == expected
    assert replayed.count((128, 1)) > 8
    # while nobody streams yet, the last token of a prompt goes along
    assert replayed.count((129, 2)) == replayed.count((128, 2)) == 1


def test_many_prompts_that_have_graphs_give_the_same(model: MambaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        make_request(f"r{i}", [(i * j + i + j * j) % VOCAB_SIZE for j in range(2 + 7 * i % 90)], 8) for i in range(60)
    ]
    expected = run(make_engine(model, "fused", 64, prefill_budget=1500), *requests).tokens
    engine = make_engine(model, "graphs", 64, prefill_budget=1500)
    while engine.prepare_more():
        pass
    replayed = watch_replays(monkeypatch)
    assert run(engine, *requests).tokens == expected
    assert max(num_chunks for _, num_chunks in replayed) > 20
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    assert num_tokens - len(requests) <= sum(size for size, _ in replayed) <= num_tokens


def test_what_cannot_be_captured_runs_without(
    model: MambaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute_logits = model.compute_logits
    expected = run(make_engine(model, "fused"), *[mixed_request(i) for i in range(10)]).tokens

    def waiting(hidden: torch.Tensor) -> torch.Tensor:
        hidden.sum().item()
        return compute_logits(hidden)

    monkeypatch.setattr(model, "compute_logits", waiting)
    engine = make_engine(model, "graphs")
    assert "cannot be captured" in caplog.text
    assert run(engine, *[mixed_request(i) for i in range(10)]).tokens == expected
    # chunks of prompts, which make no logits, are captured all the same
    while engine.prepare_more():
        pass
    assert run(engine, *[mixed_request(i) for i in range(10)]).tokens == expected
    assert caplog.text.count("cannot be captured") == 1


def test_three_hundred_requests_that_come_and_go_at_random(model: MambaForCausalLM) -> None:
    requests = [mixed_request(i, 1 + i % 31) for i in range(300)]
    engine = make_engine(model, num_slots=31)
    alone: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        alone |= run(engine, request).tokens
    source = random.Random(5)
    transcript, waiting, live = Transcript(), list(requests), list[str]()
    while waiting or engine.has_work:
        for request in waiting[: source.randrange(4)]:
            engine.submit(request)
            live.append(request.request_id)
            waiting.remove(request)
        if live and source.random() < 0.15:
            engine.abort(live.pop(source.randrange(len(live))))
        transcript.add(engine.step())
        engine.check_integrity()
    assert set(transcript.ends) == {(r.request_id, sample) for r in requests for sample in range(r.n)}
    aborted = 0
    for key, end in transcript.ends.items():
        tokens = transcript.tokens.get(key, [])
        if end.finish_reason is FinishReason.ABORT:
            aborted += 1
            assert tokens == alone[key][: len(tokens)]
        else:
            assert tokens == alone[key]
    assert 10 < aborted < 150


def test_a_poisoned_slot_does_not_spread(model: MambaForCausalLM) -> None:
    requests = [mixed_request(i, 12) for i in range(6)]
    expected = run(make_engine(model), *requests).tokens
    runner = make_runner(model, 8, "graphs")
    num_drawn = itertools.count()

    def poison(plan: StepPlan) -> None:
        for sequence in plan.rows:
            if sequence.request.request_id == "r3" and next(num_drawn) == 4:
                runner.cache.ssm[:, sequence.slot] = torch.nan

    engine = Engine(runner, num_slots=8, vocab_size=VOCAB_SIZE, prefill_budget=50, before_step=poison)
    transcript = run(engine, *requests)
    assert transcript.reason("r3") is FinishReason.ERROR
    assert transcript.tokens["r3", 0] == expected["r3", 0][:4]
    for key in expected.keys() - {("r3", 0)}:
        assert transcript.tokens[key] == expected[key]
    # every slot once more, that of the poisoned one too
    again = run(engine, *[dataclasses.replace(request, request_id=f"again-{i}") for i, request in enumerate(requests)])
    assert list(again.tokens.values()) != []
    for (name, sample), tokens in again.tokens.items():
        assert tokens == expected[f"r{name.removeprefix('again-')}", sample]


def _names(requests: list[GenerationRequest]) -> set[str]:
    return {request.request_id for request in requests}


def test_slots_are_computed_from_the_memory_that_is_free() -> None:
    free = torch.cuda.mem_get_info(GPU)[0]
    slot = free // 101
    assert 48 <= choose_max_num_seqs(GPU, slot, 0.5) <= 50
