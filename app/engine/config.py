"""What an engine is told at start. Plain values; the settings of the service translate into this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    model: a directory or a hub id. dtype: "auto" (bf16 on a GPU and on a CPU that multiplies it, else fp32), "float32",
    "bfloat16", "float16". quantization: "int8" for the large matrices, else "none". state_dtype: dtype of the
    SSM state. device: "auto", "cpu", "cuda", "cuda:1". max_num_seqs: rows that run at once, None to compute it from
    memory. prefill_budget: most prompt tokens taken into one step, which takes fewer while others stream.
    memory_fraction: share of the free device memory that states may take when max_num_seqs is None. num_threads: CPU
    threads, None for one on each usable core. cuda_graphs: whether decode steps are captured; without, each operation
    is launched on its own. tokenizer: the directory of the ``tokenizer.json`` that grammars need, or a hub id whose
    tokenizer has been fetched; None for the model's own.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: str = "none"
    state_dtype: str = "float32"
    device: str = "auto"
    max_num_seqs: int | None = None
    prefill_budget: int | None = None
    memory_fraction: float = 0.5
    num_threads: int | None = None
    cuda_graphs: bool = True
    tokenizer: str | None = None
