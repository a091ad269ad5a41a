"""How far the served model's numbers are from those of plain fp32, and where its greedy tokens leave them.

Logits: relative error ||a - b|| / ||b|| and the largest difference of a log-probability, over all positions, of the
model as it runs here against the same weights upcast to fp32 in an implementation of its own (``benchmarks.plain``);
beside it the error that rounding the matrix products to bf16 alone causes there.

Tokens: a greedy continuation of every prompt by the engine as it serves, against that of the fp32 path. At the first
difference the two likeliest tokens of the fp32 path are shown; the engine then goes on from that path's tokens, so that
every later disagreement is found as well. Their gaps tell ties from errors.

    python -m benchmarks.numerics --model models/mamba-python-15m --tokens 1000
"""

from __future__ import annotations

import argparse
import heapq
import inspect
import json.decoder
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.engine.config import EngineConfig
from app.engine.engine import Engine
from app.engine.loading import Placement, build_engine
from app.engine.request import GenerationRequest, SamplingParams, TokenEvent
from benchmarks.in_process import add_arguments, device_and_dtype, drain, load_model, print_line
from benchmarks.plain import PlainMamba, PlainState, bf16_product
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaForCausalLM
from mamba_core.ops import Packing

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    '"""Read a CSV file and print its columns."""\n\nimport csv\n',
    "def quicksort(values):\n    if len(values) <= 1:\n        return values\n",
    "for index, line in enumerate(open(path)):\n    ",
    "# Count the words of a text\nfrom collections import Counter\n\n",
    "@dataclass\nclass Point:\n    x: float\n    y: float\n\n    def distance(self, other):\n",
    "async def fetch(session, url):\n    async with session.get(url) as response:\n",
    "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def test_empty(self):\n",
    "def binary_search(array, target):\n    low, high = 0, len(array) - 1\n    while low <= high:\n",
    "try:\n    import simplejson as json\nexcept ImportError:\n",
)
NEAR_TIE = 0.01
_NUM_CANDIDATES = 8
_LOGIT_SLICE = 256


@dataclass(slots=True)
class Deviation:
    """Sums over the positions seen so far."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    max_logprob_difference: float = 0.0
    num_positions: int = 0
    num_same_argmax: int = 0

    def add(self, logits: Tensor, expected: Tensor) -> None:
        """Logits of some positions [T, V], both in fp32."""
        self.squared_error += float((logits - expected).double().square().sum())
        self.squared_norm += float(expected.double().square().sum())
        difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
        self.max_logprob_difference = max(self.max_logprob_difference, float(difference))
        self.num_positions += logits.shape[0]
        self.num_same_argmax += int((logits.argmax(-1) == expected.argmax(-1)).sum())

    def describe(self) -> dict[str, Any]:
        return {
            "relative_error": float(f"{(self.squared_error / self.squared_norm) ** 0.5:.4g}"),
            "max_logprob_difference": float(f"{self.max_logprob_difference:.4g}"),
            "same_argmax": round(self.num_same_argmax / self.num_positions, 5),
            "positions": self.num_positions,
        }


@dataclass(slots=True)
class Continuation:
    """What the fp32 path says after a prompt: its tokens, and at each of them the likeliest ones [n, candidates]."""

    prompt: tuple[int, ...]
    tokens: list[int]
    candidates: Tensor
    logprobs: Tensor
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    num_compared: int = 0

    @property
    def is_compared(self) -> bool:
        return self.num_compared == len(self.tokens)

    def compare(self, tokens: Sequence[int]) -> None:
        """Hold what the engine said after the tokens compared so far against this, up to the first difference."""
        for token in tokens:
            position = self.num_compared
            self.num_compared += 1
            if token != self.tokens[position]:
                self.disagreements.append(self._disagreement(position, token))
                return

    def _disagreement(self, position: int, token: int) -> dict[str, Any]:
        logprobs = [float(value) for value in self.logprobs[position]]
        ids = self.candidates[position].tolist()
        rank = ids.index(token) if token in ids else None
        return {
            "position": position,
            "fp32_top_two": [[ids[0], round(logprobs[0], 5)], [ids[1], round(logprobs[1], 5)]],
            "gap": round(logprobs[0] - logprobs[1], 5),
            "engine_token": token,
            # how much less likely than the likeliest the fp32 path holds the engine's token
            "engine_gap": None if rank is None else round(logprobs[0] - logprobs[rank], 5),
        }


def measure_logits(model: MambaForCausalLM, tokens: Tensor) -> list[dict[str, Any]]:
    """The deviations of every path over tokens [B, L]."""
    plain, rounded = PlainMamba(model), PlainMamba(model, bf16_product)
    num_rows = tokens.shape[0]
    expected = plain.hidden(tokens, plain.fresh_state(num_rows)).flatten(0, 1)
    lines = []
    for path, hidden, source in (
        ("prefill", prefill_hidden(model, tokens), model.compute_logits),
        ("decode", decode_hidden(model, tokens), model.compute_logits),
        ("bf16 products alone", rounded.hidden(tokens, rounded.fresh_state(num_rows)).flatten(0, 1), rounded.logits),
    ):
        deviation = Deviation()
        with torch.inference_mode():
            for ours, theirs in zip(
                torch.split(hidden, _LOGIT_SLICE), torch.split(expected, _LOGIT_SLICE), strict=True
            ):
                deviation.add(source(ours).float(), plain.logits(theirs))
        lines.append({"path": path, **deviation.describe()})
    return lines


@torch.inference_mode()
def prefill_hidden(model: MambaForCausalLM, tokens: Tensor) -> Tensor:
    """tokens [B, L] through the model as packed prompts -> [B * L, H]."""
    num_rows, length = tokens.shape
    packing = Packing.from_lengths([length] * num_rows, torch.arange(num_rows, device=tokens.device))
    return model.forward_packed(tokens.flatten(), packing, new_cache(model, num_rows))


@torch.inference_mode()
def decode_hidden(model: MambaForCausalLM, tokens: Tensor) -> Tensor:
    """The same, one token of every row at a time."""
    num_rows, length = tokens.shape
    cache, packing = new_cache(model, num_rows), Packing.step(torch.arange(num_rows, device=tokens.device))
    steps = [model.forward_packed(tokens[:, t].contiguous(), packing, cache).clone() for t in range(length)]
    return torch.stack(steps, 1).flatten(0, 1)


def new_cache(model: MambaForCausalLM, num_rows: int) -> MambaCache:
    weight = model.lm_head.weight
    return MambaCache.from_config(model.config, num_rows, dtype=weight.dtype, device=weight.device)


def continue_plainly(model: MambaForCausalLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Continuation]:
    """Greedy continuations by the fp32 path, of all prompts together once each has been read."""
    plain = PlainMamba(model)
    state, last = read_prompts(plain, prompts)
    candidates, logprobs = [], []
    for _ in range(num_tokens):
        top = plain.logits(last).log_softmax(-1).topk(_NUM_CANDIDATES)
        candidates.append(top.indices)
        logprobs.append(top.values)
        last = plain.hidden(top.indices[:, :1], state)[:, -1]
    ids, values = torch.stack(candidates, 1).cpu(), torch.stack(logprobs, 1).cpu()  # [B, n, candidates]
    rows = range(len(prompts))
    return [Continuation(tuple(prompts[row]), ids[row, :, 0].tolist(), ids[row], values[row]) for row in rows]


def read_prompts(plain: PlainMamba, prompts: Sequence[Sequence[int]]) -> tuple[PlainState, Tensor]:
    """The states after prompts of any lengths, and the hidden states [B, H] of their last tokens."""
    states, lasts = [], []
    for prompt in prompts:
        states.append(plain.fresh_state(1))
        lasts.append(plain.hidden(torch.tensor([prompt], device=states[-1].ssm.device), states[-1])[:, -1])
    return PlainState.join(states), torch.cat(lasts)


def disagree_by_rounding(model: MambaForCausalLM, continuations: list[Continuation]) -> dict[str, Any]:
    """Where rounding the matrix products to bf16 alone makes another token the likeliest, along the same tokens."""
    plain = PlainMamba(model, bf16_product)
    state, last = read_prompts(plain, [c.prompt for c in continuations])
    tokens = torch.tensor([c.tokens for c in continuations], device=last.device)  # [B, n]
    hidden = torch.cat([last[:, None], plain.hidden(tokens[:, :-1], state)], 1)
    likeliest = torch.cat([plain.logits(part).argmax(-1) for part in torch.split(hidden, _LOGIT_SLICE // 8, 1)], 1)
    gaps = torch.stack([c.logprobs[:, 0] - c.logprobs[:, 1] for c in continuations])[(likeliest != tokens).cpu()]
    return {
        "disagreements": gaps.numel(),
        "disagreements_beyond_near_tie": int((gaps > NEAR_TIE).sum()),
        "largest_gap": round(float(gaps.max()), 5) if gaps.numel() else None,
    }


def compare_engine(engine: Engine, continuations: list[Continuation]) -> None:
    """Let the engine continue every prompt greedily, after each difference from the fp32 path's tokens."""
    while unfinished := [c for c in continuations if not c.is_compared]:
        answers = ask(engine, unfinished)
        for continuation, tokens in zip(unfinished, answers, strict=True):
            continuation.compare(tokens)


def ask(engine: Engine, continuations: list[Continuation]) -> list[list[int]]:
    """What the engine says from where each continuation stands, all at once."""
    for index, continuation in enumerate(continuations):
        prompt = (*continuation.prompt, *continuation.tokens[: continuation.num_compared])
        num_tokens = len(continuation.tokens) - continuation.num_compared
        engine.submit(GenerationRequest(str(index), prompt, SamplingParams(temperature=0.0), num_tokens))
    answers: list[list[int]] = [[] for _ in continuations]
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, TokenEvent)
            assert event.error is None, event.error
            if event.token_id is not None:
                answers[int(event.request_id)].append(event.token_id)
    drain(engine)
    return answers


def summarize(continuations: list[Continuation]) -> dict[str, Any]:
    """Over all prompts; a gap above the near-tie's is an error that rounding does not explain."""
    gaps = [found["gap"] for c in continuations for found in c.disagreements]
    return {
        "prompts": len(continuations),
        "tokens": sum(len(c.tokens) for c in continuations),
        "equal_to_the_end": sum(not c.disagreements for c in continuations),
        "first_differences_beyond_near_tie": sum(
            c.disagreements[0]["gap"] > NEAR_TIE for c in continuations if c.disagreements
        ),
        "disagreements": len(gaps),
        "disagreements_beyond_near_tie": sum(gap > NEAR_TIE for gap in gaps),
        "largest_gap": max(gaps, default=None),
    }


def token_rows(name: str, vocab_size: int, num_rows: int, length: int) -> list[list[int]]:
    """Tokens of Python's own sources for a model with a tokenizer, random ones otherwise."""
    if (Path(name) / "tokenizer.json").exists():
        text = "\n".join(inspect.getsource(module) for module in (textwrap, json.decoder, heapq, random, argparse))
        tokens = encode(name, text)
        if len(tokens) >= num_rows * length:
            return [tokens[row * length : (row + 1) * length] for row in range(num_rows)]
    dice = random.Random(length)
    return [[dice.randrange(vocab_size) for _ in range(length)] for _ in range(num_rows)]


def encode(directory: str, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(Path(directory) / "tokenizer.json")).encode(text).ids
    return ids


def prompts_of(name: str, vocab_size: int) -> list[list[int]]:
    """At least ten beginnings."""
    if (Path(name) / "tokenizer.json").exists():
        return [encode(name, prompt) for prompt in PROMPTS]
    return token_rows(name, vocab_size, len(PROMPTS), 16)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=4, help="sequences whose logits are compared")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them")
    parser.add_argument("--tokens", type=int, default=0, help="greedy tokens to compare per prompt; 0 for none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_float32_matmul_precision("highest")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    name, model = load_model(options)
    device, dtype = device_and_dtype(options)
    about = {"model": name, "dtype": str(dtype).removeprefix("torch."), "device": device.type}
    source, vocab_size = options.model or "", model.config.vocab_size
    if options.length:
        tokens = torch.tensor(token_rows(source, vocab_size, options.rows, options.length), device=device)
        for line in measure_logits(model, tokens):
            print_line({"benchmark": "logits", **about, **line})
    if options.tokens:
        continuations = continue_plainly(model, prompts_of(source, vocab_size), options.tokens)
        state_dtype = getattr(torch, options.state_dtype)
        config = EngineConfig(name, max_num_seqs=len(continuations), prefill_budget=8192)
        engine, _ = build_engine(model, config, Placement(device, dtype, state_dtype))
        compare_engine(engine, continuations)
        for index, continuation in enumerate(continuations):
            print_line({"benchmark": "greedy", **about, "prompt": index, "disagreements": continuation.disagreements})
        rounding = disagree_by_rounding(model, continuations)
        print_line({"benchmark": "greedy", **about, **summarize(continuations), "bf16_products_alone": rounding})


if __name__ == "__main__":
    main()
