"""An engine in this process, over a checkpoint or over random weights; needs torch, triton and transformers alone."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from app.engine.config import EngineConfig
from app.engine.engine import Engine
from app.engine.loading import Placement, build_engine
from app.engine.memory import keep_freed_memory
from app.engine.request import GenerationRequest, SamplingParams
from benchmarks.machine import Machine, measure_machine, versions
from mamba_core import checkpoints
from mamba_core.cache import MambaCache
from mamba_core.configuration_mamba import MambaConfig
from mamba_core.modeling_mamba import MambaForCausalLM
from mamba_core.quantization import quantize_int8

# hidden size and layers of the published models; the rest is the same for all of them
SHAPES = {
    "tiny": (64, 2),
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}
VOCAB_SIZE = 50_280
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a model on a device, and the rates of that device."""

    name: str
    model: MambaForCausalLM
    device: torch.device
    dtype: torch.dtype
    state_dtype: torch.dtype
    machine: Machine

    @property
    def config(self) -> MambaConfig:
        config: MambaConfig = self.model.config
        return config

    @property
    def slot_bytes(self) -> int:
        return MambaCache.slot_bytes(self.config, self.dtype, self.state_dtype)

    def engine(self, num_slots: int, prefill_budget: int) -> Engine:
        """An engine as the server builds it, warmed up."""
        config = EngineConfig(self.name, max_num_seqs=num_slots, prefill_budget=prefill_budget)
        placement = Placement(self.device, self.dtype, self.state_dtype)
        return build_engine(self.model, config, placement)[0]

    def floor_seconds(self, num_tokens: int, num_rows: int) -> float:
        """The least time of a step that takes ``num_tokens`` through the layers and makes logits of ``num_rows``.

        Weights are read once, states read and written once; the products of all tokens are multiplied. Nothing else
        is counted, so that no implementation can be faster.
        """
        num_bytes = _weight_bytes(self.model) + 2 * num_rows * self.slot_bytes
        head = self.config.vocab_size * self.config.hidden_size
        flops = 2 * (num_tokens * _layer_products(self.config) + num_rows * head)
        return self.machine.floor_seconds(num_bytes, flops)

    def describe(self) -> dict[str, Any]:
        """What belongs into every line of results."""
        return {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "matrices": str(self.model.lm_head.weight.dtype).removeprefix("torch."),
            "state_dtype": str(self.state_dtype).removeprefix("torch."),
            "device": self.machine.device,
            "versions": versions(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="directory or hub id of a checkpoint")
    which.add_argument("--random", choices=sorted(SHAPES), help="a published shape with random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--state-dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--quantization", choices=("none", "int8"), default="none")
    parser.add_argument("--threads", type=int, help="CPU threads")


def load_subject(options: argparse.Namespace) -> Subject:
    """Measure the machine, print what it can do, load or make the model."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = device_and_dtype(options)
    if device.type == "cpu":
        # as a server does
        keep_freed_memory()
    machine = measure_machine(device, dtype)
    print_line(
        {
            "device": machine.device,
            "copy_gb_per_s": round(machine.copy_bytes_per_s / 1e9, 1),
            "read_gb_per_s": round(machine.read_bytes_per_s / 1e9, 1),
            "product_tflop_per_s": round(machine.product_flops_per_s / 1e12, 3),
            "dtype": str(dtype).removeprefix("torch."),
        }
    )
    name, model = load_model(options)
    if options.quantization == "int8":
        quantize_int8(model)
    return Subject(name, model, device, dtype, _DTYPES[options.state_dtype], machine)


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Where the model runs, and the type of its weights."""
    device = torch.device(options.device)
    return device, _DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]


def load_model(options: argparse.Namespace) -> tuple[str, MambaForCausalLM]:
    """The model that the arguments name, and what to call it."""
    device, dtype = device_and_dtype(options)
    if options.random:
        return f"random {options.random}", random_model(options.random, device, dtype)
    directory = checkpoints.resolve(options.model)
    return directory.name, checkpoints.load(directory, dtype=dtype, device=device)


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> MambaForCausalLM:
    """Random weights of a published shape, made on the device; the speed of random weights is that of trained ones."""
    hidden_size, num_layers = SHAPES[name]
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=hidden_size, num_hidden_layers=num_layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MambaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()
    return model


def greedy_request(name: str, num_prompt_tokens: int, max_tokens: int, vocab_size: int) -> GenerationRequest:
    """A request of random tokens that nothing ends but ``max_tokens``."""
    tokens = random.Random(name)
    prompt = tuple(tokens.randrange(vocab_size) for _ in range(num_prompt_tokens))
    return GenerationRequest(name, prompt, SamplingParams(temperature=0.0), max_tokens)


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def numbers(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argument type: values separated by commas."""
    return lambda text: [parse(part) for part in text.split(",")]


def print_line(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def _weight_bytes(model: MambaForCausalLM) -> int:
    total: int = sum(parameter.nbytes for parameter in model.parameters())
    if model.lm_head.weight is model.backbone.embeddings.weight:
        return total
    # of an embedding that is not the head as well, a step reads a few rows
    embedding: int = model.backbone.embeddings.weight.nbytes
    return total - embedding


def _layer_products(config: MambaConfig) -> int:
    """Multiplications per token in the four products of all layers."""
    hidden, channels, rank = config.hidden_size, config.intermediate_size, int(config.time_step_rank)
    per_layer = hidden * 2 * channels + channels * (rank + 2 * config.state_size) + rank * channels + channels * hidden
    return config.num_hidden_layers * per_layer
