"""Decode steps and prompts of llama.cpp in one process, through the functions of ``llama_cpp``.

Runs under the Python that has llama-cpp-python and needs nothing else, this project included: a job comes as JSON on
standard input, one line of JSON per case goes out. What is timed is what ``benchmarks.decode`` and
``benchmarks.prefill`` time of the engine: the decoding of all rows together and greedy sampling.

    {"model": "model.gguf", "threads": 2, "warm_up": 10, "steps": 64, "decode": [[[1, 2], [3, 4]]],
     "prefill": [[5, 6, 7]], "repeats": 3}

``decode`` holds a list of prompts for each case, ``prefill`` one prompt for each.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp

_BATCH_TOKENS = 2048
_MICROBATCH_TOKENS = 512


class Rows:
    """Sequences that llama.cpp decodes together. Raises RuntimeError when it does not."""

    def __init__(self, path: str, num_threads: int, num_rows: int, context_length: int) -> None:
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_rows * context_length
        parameters.n_batch, parameters.n_ubatch = _BATCH_TOKENS, _MICROBATCH_TOKENS
        parameters.n_seq_max = num_rows
        parameters.n_threads = parameters.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {num_rows} rows")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._greedy = llama_cpp.llama_sampler_init_greedy()
        self._lengths = [0] * num_rows

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._lengths = [0] * len(self._lengths)

    def read(self, row: int, prompt: Sequence[int]) -> int:
        """Take in a prompt, return the token that follows."""
        pieces = [prompt[start : start + _BATCH_TOKENS] for start in range(0, len(prompt), _BATCH_TOKENS)]
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            for index, token in enumerate(piece):
                self._add(row, token, is_last and index == len(piece) - 1)
            self._decode()
        return self._sample(-1)

    def step(self, tokens: Sequence[int]) -> list[int]:
        """One token of each of the first rows in, the next one of each out."""
        for row, token in enumerate(tokens):
            self._add(row, token, True)
        self._decode()
        return [self._sample(row) for row in range(len(tokens))]

    def _add(self, row: int, token: int, is_output: bool) -> None:
        batch, index = self._batch, self._batch.n_tokens
        batch.token[index], batch.pos[index] = token, self._lengths[row]
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, row, is_output
        batch.n_tokens += 1
        self._lengths[row] += 1

    def _decode(self) -> None:
        status = llama_cpp.llama_decode(self._context, self._batch)
        self._batch.n_tokens = 0
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")

    def _sample(self, index: int) -> int:
        return int(llama_cpp.llama_sampler_sample(self._greedy, self._context, index))


def time_decode(rows: Rows, prompts: Sequence[Sequence[int]], job: dict[str, Any]) -> dict[str, Any]:
    rows.clear()
    tokens = [rows.read(row, prompt) for row, prompt in enumerate(prompts)]
    for _ in range(job["warm_up"]):
        tokens = rows.step(tokens)
    seconds = []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        tokens = rows.step(tokens)
        seconds.append(time.perf_counter() - start)
    return {
        "case": f"decode {len(prompts)}",
        "ms": round(1e3 * statistics.median(seconds), 3),
        "tokens_per_s": round(len(prompts) * len(seconds) / sum(seconds), 1),
    }


def time_prefill(rows: Rows, prompt: Sequence[int], repeats: int) -> dict[str, Any]:
    seconds = []
    for _ in range(repeats):
        rows.clear()
        start = time.perf_counter()
        rows.read(0, prompt)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "case": f"prefill {len(prompt)}",
        "ms": round(1e3 * median, 3),
        "tokens_per_s": round(len(prompt) / median, 1),
    }


def run(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    num_rows = max((len(prompts) for prompts in job["decode"]), default=1)
    lengths = [len(prompt) for prompts in job["decode"] for prompt in prompts]
    longest = max([*lengths, *map(len, job["prefill"])], default=0)
    rows = Rows(job["model"], job["threads"], num_rows, longest + job["warm_up"] + job["steps"] + 1)
    yield {
        "case": "about",
        "llama_cpp_python": llama_cpp.__version__,
        "system_info": llama_cpp.llama_print_system_info().decode().strip(),
    }
    # once, so that weights and buffers are in memory
    rows.read(0, list(range(32)))
    for prompts in job["decode"]:
        yield time_decode(rows, prompts, job)
    for prompt in job["prefill"]:
        yield time_prefill(rows, prompt, job["repeats"])


def main() -> None:
    job = json.load(sys.stdin)
    for line in run(job):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
