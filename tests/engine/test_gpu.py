"""On a GPU: the same uniforms to the bit, the same draws, and the tokens that the CPU gives."""

from __future__ import annotations

import pytest
import torch

from app.engine import distribution
from app.engine.engine import Engine
from app.engine.memory import choose_max_num_seqs
from app.engine.request import FinishReason
from app.engine.runner import Runner
from app.engine.sampler import Sampler
from app.engine.sequence import Sequence
from mamba_core import MambaCache, MambaConfig, MambaForCausalLM
from tests.engine.fakes import make_request, run

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


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


def make_engine(model: MambaForCausalLM, device: torch.device) -> Engine:
    cache = MambaCache.from_config(model.config, 9, dtype=torch.float32, device=device)
    cache.ssm.fill_(torch.nan)
    cache.conv.fill_(torch.nan)
    return Engine(Runner(model.to(device), cache, 97), num_slots=8, vocab_size=97, prefill_budget=50)


def test_an_engine_gives_the_tokens_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=3)).eval()
    requests = [
        make_request(
            f"r{i}", [(7 * i + j) % 97 for j in range(1 + 9 * i)], 20, n=1 + i % 2, logprobs=2, prompt_logprobs=0
        )
        for i in range(12)
    ]
    on_cpu = run(make_engine(model, torch.device("cpu")), *requests)
    on_gpu = run(make_engine(model, GPU), *requests)
    assert on_gpu.tokens == on_cpu.tokens
    assert {end.finish_reason for end in on_gpu.ends.values()} == {FinishReason.LENGTH}


def test_slots_are_computed_from_the_memory_that_is_free() -> None:
    free = torch.cuda.mem_get_info(GPU)[0]
    slot = free // 101
    assert 48 <= choose_max_num_seqs(GPU, slot, 0.5) <= 50
