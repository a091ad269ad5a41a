"""From settings to an engine that has made its first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from app.engine.compiling import GrammarCompiler
from app.engine.config import EngineConfig
from app.engine.cores import usable_cores
from app.engine.engine import Engine
from app.engine.interface import EngineStartError
from app.engine.matchers import Compiler
from app.engine.memory import MemoryTooSmall, choose_max_num_seqs, keep_freed_memory
from app.engine.request import GenerationRequest, ModelInfo, SamplingParams
from app.engine.runner import Runner
from app.engine.stages import stage
from mamba_core import checkpoints
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaForCausalLM
from mamba_core.ops import native
from mamba_core.quantization import quantize_int8

logger = logging.getLogger(__name__)

DEFAULT_PREFILL_BUDGET = {"cpu": 512, "cuda": 8192}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# prompts that arrive together, and their length: on a GPU few and many, short and long have kernels of their own
_WARM_UPS = {"cpu": ((1, 32), (1, 256)), "cuda": ((1, 32), (1, 512), (4, 24), (12, 24), (64, 24))}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs and in which types, resolved from the settings."""

    device: torch.device
    dtype: torch.dtype
    state_dtype: torch.dtype
    quantization: str = "none"

    @property
    def weight_dtype(self) -> str:
        """The type of most weights."""
        return _name(self.dtype) if self.quantization == "none" else self.quantization

    @classmethod
    def from_config(cls, config: EngineConfig) -> Placement:
        device = _find_device(config.device)
        dtype = _find_dtype("dtype", _auto_dtype(device) if config.dtype == "auto" else config.dtype)
        if config.quantization not in ("none", "int8"):
            raise EngineStartError(f"unknown quantization {config.quantization!r}: use none or int8")
        return cls(device, dtype, _find_dtype("state_dtype", config.state_dtype), config.quantization)


def load_engine(config: EngineConfig, report_checked: Callable[[str], None]) -> tuple[Engine, ModelInfo]:
    """Load a checkpoint and warm it up. ``report_checked`` gets its directory before the weights are read.

    Raises EngineStartError for what the operator can mend.
    """
    try:
        placement = Placement.from_config(config)
        _set_threads(config)
        if placement.device.type == "cpu":
            keep_freed_memory()
            logger.info("weights in %s, %d threads", placement.weight_dtype, torch.get_num_threads())
        with stage("checking the checkpoint"):
            model_dir = checkpoints.resolve(config.model, config.revision)
            checkpoint = checkpoints.inspect(model_dir)
        report_checked(str(model_dir))
        with stage("loading the weights"):
            model = checkpoints.load(checkpoint, dtype=placement.dtype, device=placement.device)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if config.quantization == "int8":
            with stage("quantizing the weights"):
                quantize_int8(model)
            if placement.device.type == "cuda":
                # what the matrices have left is for states
                torch.cuda.empty_cache()
        ends = checkpoints.eos_token_ids(model_dir, checkpoint.config)
        grammars = Compiler(config.tokenizer or model_dir, model.config.vocab_size, ends)
        engine, info = build_engine(model, config, placement, grammars)
        info = replace(info, num_parameters=num_parameters, dtype=placement.weight_dtype)
        return engine, replace(info, model_dir=str(model_dir), eos_token_ids=ends)
    except (checkpoints.CheckpointError, MemoryTooSmall) as error:
        raise EngineStartError(str(error)) from error


def build_engine(
    model: MambaForCausalLM, config: EngineConfig, placement: Placement, grammars: GrammarCompiler | None = None
) -> tuple[Engine, ModelInfo]:
    """An engine around a model that is loaded. Raises MemoryTooSmall."""
    device, dtype, state_dtype = placement.device, placement.dtype, placement.state_dtype
    model.eval()
    may_lag = _may_lag(model, placement, config.max_num_seqs)
    num_slots = config.max_num_seqs or _fitting(model, config, placement, may_lag=may_lag)
    if may_lag and not _may_lag(model, placement, num_slots):
        may_lag, num_slots = False, _fitting(model, config, placement, may_lag=False)
    cache = MambaCache.from_config(
        model.config,
        num_slots + 1,
        dtype=dtype,
        state_dtype=state_dtype,
        device=device,
        may_lag=may_lag,
    )
    vocab_size = model.config.vocab_size
    budget = config.prefill_budget or DEFAULT_PREFILL_BUDGET[device.type]
    runner = _make_runner(model, cache, budget, cuda_graphs=config.cuda_graphs)
    with stage("getting ready for the first steps"):
        runner.start()
    with stage("warming up"):
        trial = Engine(runner, num_slots=num_slots, vocab_size=vocab_size, prefill_budget=budget)
        warm_up(trial, vocab_size, _WARM_UPS[device.type])
    engine = Engine(runner, num_slots=num_slots, vocab_size=vocab_size, prefill_budget=budget, grammars=grammars)
    return engine, _describe(model, placement, num_slots, cache.bytes_per_slot)


def warm_up(engine: Engine, vocab_size: int, batches: tuple[tuple[int, int], ...]) -> None:
    """Make the first steps, so that what is compiled or allocated once is so before the first request.

    batches: numbers of prompts that are taken together, and their lengths.
    """
    sampling = SamplingParams(top_p=0.9, logprobs=0)
    for num_prompts, length in batches:
        prompt = tuple(index % vocab_size for index in range(length))
        for number in range(min(num_prompts, engine.stats.num_slots)):
            engine.submit(GenerationRequest(f"warm-up-{number}", prompt, sampling, max_tokens=2))
        while engine.has_work:
            for event in engine.step():
                if getattr(event, "error", None):
                    raise RuntimeError("the model produced no usable token while warming up")


def _make_runner(model: MambaForCausalLM, cache: MambaCache, prefill_budget: int, *, cuda_graphs: bool) -> Runner:
    if cache.device.type != "cuda":
        return Runner(model, cache, model.config.vocab_size, is_uniform=True)
    # needs triton, which there may not be elsewhere
    from app.engine.cuda import cuda_runner

    vocab_size = model.config.vocab_size
    return cuda_runner(model, cache, vocab_size, cuda_graphs=cuda_graphs, prefill_budget=prefill_budget)


def _fitting(model: MambaForCausalLM, config: EngineConfig, placement: Placement, *, may_lag: bool) -> int:
    """Sequences that run at once if nobody says how many."""
    slot_bytes = MambaCache.slot_bytes(model.config, placement.dtype, placement.state_dtype, may_lag=may_lag)
    return choose_max_num_seqs(placement.device, slot_bytes, config.memory_fraction)


def _may_lag(model: MambaForCausalLM, placement: Placement, num_rows: int | None) -> bool:
    """Whether there are steps, of up to ``num_rows``, that are faster if states may lack a token."""
    if placement.device.type != "cuda":
        return False
    from app.engine.cuda import may_lag

    return may_lag(model, placement.state_dtype, num_rows)


def _describe(model: MambaForCausalLM, placement: Placement, num_slots: int, bytes_per_slot: int) -> ModelInfo:
    config = model.config
    return ModelInfo(
        model_dir=config.name_or_path,
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        dtype=_name(placement.dtype),
        state_dtype=_name(placement.state_dtype),
        device=str(placement.device),
        max_num_seqs=num_slots,
        state_bytes_per_seq=bytes_per_slot,
        bos_token_id=config.bos_token_id,
        eos_token_ids=_eos_token_ids(model),
        pad_token_id=config.pad_token_id,
    )


def _eos_token_ids(model: MambaForCausalLM) -> tuple[int, ...]:
    """Ends of text, which a checkpoint names in its generation config or in its config, as one id or several."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def _find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineStartError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in DEFAULT_PREFILL_BUDGET:
        raise EngineStartError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index or 0
        if index >= count:
            raise EngineStartError(f"there is no device {name}: {count} CUDA devices are visible")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def _auto_dtype(device: torch.device) -> str:
    """Half the bytes where they are multiplied as fast: on a GPU, and on a CPU that has instructions for it."""
    return "bfloat16" if device.type == "cuda" or native.multiplies_bfloat16() else "float32"


def _set_threads(config: EngineConfig) -> None:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


def _find_dtype(setting: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise EngineStartError(f"unknown {setting} {name!r}: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
