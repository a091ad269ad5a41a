"""The model that ships: its files, its card, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.mamba.modeling_mamba import MambaForCausalLM as UpstreamMamba

from app.engine.config import EngineConfig
from app.engine.loading import load_engine
from app.engine.request import GenerationRequest, SamplingParams, TokenEvent
from mamba_core import MambaForCausalLM, ops

MODEL = Path(__file__).parents[1] / "models" / "mamba-python-15m"
PROMPT = "import argparse\n\n\ndef main():\n    parser = argparse."
PROMPTS = [PROMPT[: 5 + index] + "x" * (index * index % 90) for index in range(32)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_its_files_keep_the_repository_light() -> None:
    shards = list(MODEL.glob("*.safetensors"))
    assert all(path.stat().st_size <= 15_000_000 for path in shards)
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 32_000_000
    dtypes = set()
    for path in shards:
        with safe_open(path, "pt") as file:
            names = file.keys()
            dtypes |= {(name.rpartition(".")[2], file.get_slice(name).get_dtype()) for name in names}
    assert {dtype for _, dtype in dtypes} == {"BF16", "F32"}
    assert {name for name, dtype in dtypes if dtype == "F32"} == {"A_log", "D"}


def test_it_beats_the_baselines_of_its_card() -> None:
    results = json.loads((MODEL / "evaluation.json").read_text())
    trained, baselines = results["trained"], results["baselines"]
    bits_per_byte = sum(trained["bits"]) / sum(trained["bytes"])
    assert f"**{bits_per_byte:.3f} bits per byte**" in (MODEL / "README.md").read_text()
    num_bytes = sum(trained["bytes"])
    assert bits_per_byte < 0.5 * min(baselines["xz_bits"].values()) / num_bytes
    assert bits_per_byte < 0.5 * sum(baselines["ngram_bits"]) / num_bytes


def test_transformers_own_class_gives_the_same_logits(tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    ours = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert type(ours) is MambaForCausalLM
    theirs = UpstreamMamba.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.inference_mode():
        difference = ours(ids).logits - theirs(ids).logits
    assert difference.abs().max() <= 1e-4


def generate(prompts: list[list[int]], device: str, max_tokens: int, together: bool) -> list[list[int]]:
    """Greedy tokens of an engine, for all prompts in one batch or for one after the other, in fp32."""
    config = EngineConfig(str(MODEL), dtype="float32", device=device, max_num_seqs=len(prompts), num_threads=1)
    engine, _ = load_engine(config, lambda _: None)
    tokens: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(str(number), tuple(prompt), SamplingParams(temperature=0.0), max_tokens))
        while engine.has_work and (not together or number == len(prompts) - 1):
            for event in engine.step():
                if isinstance(event, TokenEvent) and event.token_id is not None:
                    tokens.setdefault(event.request_id, []).append(event.token_id)
    return [tokens[str(number)] for number in range(len(prompts))]


def test_it_writes_python(tokenizer: Tokenizer) -> None:
    (tokens,) = generate([tokenizer.encode(PROMPT).ids], "cpu", 4, together=True)
    assert tokenizer.decode(tokens).startswith("ArgumentParser(")


def test_compiled_ops_write_what_torchs_write(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS[::4]]
    compiled = generate(prompts, "cpu", 40, together=True)
    monkeypatch.setattr(ops, "_has_numba", lambda: False)
    monkeypatch.setattr(ops.native, "is_available", lambda: False)
    assert generate(prompts, "cpu", 40, together=True) == compiled


@pytest.mark.gpu
def test_a_gpu_writes_what_a_cpu_writes(tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS[::4]]
    expected = generate(prompts, "cpu", 100, together=True)
    assert generate(prompts, "cuda", 100, together=True) == expected
    assert generate(prompts[:3], "cuda", 100, together=False) == expected[:3]
