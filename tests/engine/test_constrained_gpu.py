"""On a GPU: masked rows obey, through graphs and without, and rows beside them draw what they draw alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from app.engine.cuda import cuda_runner
from app.engine.engine import Engine
from app.engine.forced import STEPS_PER_CHUNK
from app.engine.matchers import Compiler
from app.engine.runner import Runner
from mamba_core import MambaCache, MambaConfig, MambaForCausalLM
from tests.engine.constrained import assert_obeyed, crowd, run
from tests.engine.fakes import VOCAB_SIZE
from tests.engine.spelling import make_compiler

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return make_compiler(tmp_path_factory.mktemp("tokenizer"))


def make_engine(compiler: Compiler, mode: str, num_slots: int) -> Engine:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    device = torch.device("cpu") if mode == "cpu" else torch.device("cuda", 0)
    model = model.eval().to(device)
    cache = MambaCache.from_config(model.config, num_slots + 1, dtype=torch.float32, device=device)
    if mode == "cpu":
        runner = Runner(model, cache, VOCAB_SIZE)
    else:
        runner = cuda_runner(model, cache, VOCAB_SIZE, cuda_graphs=mode == "graphs")
    runner.start()
    return Engine(runner, num_slots=num_slots, vocab_size=VOCAB_SIZE, prefill_budget=50, grammars=compiler)


@pytest.mark.parametrize("mode", ["fused", "graphs"])
@pytest.mark.parametrize("num_slots", [3, 40])
def test_masked_rows_obey_and_draw_what_the_cpu_draws(compiler: Compiler, mode: str, num_slots: int) -> None:
    requests = crowd()
    on_gpu = run(make_engine(compiler, mode, num_slots), *requests)
    assert_obeyed(requests, on_gpu)
    on_cpu = run(make_engine(compiler, "cpu", num_slots), *requests)
    # numbers that lie within rounding of each other may be told apart differently
    assert sum(on_gpu.tokens[key] == on_cpu.tokens[key] for key in on_cpu.tokens) >= len(on_cpu.tokens) - 2


@pytest.mark.parametrize("mode", ["fused", "graphs"])
def test_rows_beside_masked_ones_draw_what_they_draw_alone(compiler: Compiler, mode: str) -> None:
    requests = crowd()
    plain = [request for request in requests if request.request_id.endswith("-0")]
    # as many rows, so that the same kernels run
    together = run(make_engine(compiler, mode, 60), *requests)
    alone = run(make_engine(compiler, mode, 60), *plain)
    assert {key: tokens for key, tokens in together.tokens.items() if key in alone.tokens} == alone.tokens


@pytest.mark.parametrize("mode", ["fused", "graphs"])
@pytest.mark.parametrize("num_slots", [1, 3, 40])
def test_forced_tokens_taken_at_once_change_nothing(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, mode: str, num_slots: int
) -> None:
    requests = [request for request in crowd() if request.n <= num_slots]
    transcripts, steps = [], []
    for cost in (0.0, math.inf):
        monkeypatch.setitem(STEPS_PER_CHUNK, "cuda", cost)
        engine = make_engine(compiler, mode, num_slots)
        while engine.prepare_more():
            pass
        transcripts.append(run(engine, *requests))
        assert_obeyed(requests, transcripts[-1])
        steps.append(engine.stats.num_steps)
    at_once, one_by_one = (transcript.tokens for transcript in transcripts)
    # numbers that lie within rounding of each other may be told apart differently
    assert sum(at_once[key] == one_by_one[key] for key in one_by_one) >= len(one_by_one) - 2
    # with a slot for each, the longest one decides, which may be without a grammar
    assert steps[0] < steps[1] or num_slots == 40


def test_a_tokenizer_with_fewer_tokens_than_the_model_is_enough(tmp_path: Path) -> None:
    compiler = make_compiler(tmp_path)
    requests = [request for request in crowd() if request.sampling.grammar is not None]
    assert_obeyed(requests, run(make_engine(compiler, "graphs", 8), *requests))
