"""Compiles the kernels of a CPU for Arm, in a process that believes to run there; prints a line of JSON for each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from mamba_core.ops.native import threads
from mamba_core.ops.native.callbacks import head_callback, step_callback
from tests.compiling import print_records
from tests.core.cpu_targets import PLAIN_KINDS, program_of, programs_kept

TARGETS = {"neoverse-v1": "aarch64-unknown-linux-gnu", "apple-m1": "arm64-apple-darwin"}
# 128 bits or more that are multiplied
_VECTORS = re.compile(r"\bfm(?:la|ul)\s+(v\d+\.4s|z\d+\.s)|\bfm(?:la|ul)\.4s\b")
# functions of numba's, of Python's and our own are called as well
_CALL = re.compile(r"\bbl\s+(?!_*(?:NRT_|Py|numba|ZN))_?(\w+)")


def callbacks() -> dict[str, Any]:
    # made when they are imported
    from mamba_core.ops.numba_ops import conv, norm, quantized, scan

    found = {"scan": scan._scan_tasks, "conv": conv._conv_tasks, "norm": norm._norm_tasks}
    found["dequantize"] = quantized._widen_tasks
    for kind in PLAIN_KINDS:
        name = "int8" if kind.is_int8 else "float32" if kind.is_float32 else "bfloat16"
        found |= {f"step {name}": step_callback(kind), f"head {name}": head_callback(kind)}
    return found


def records() -> Iterator[dict[str, Any]]:
    arm = SimpleNamespace(machine=lambda: "aarch64")
    with programs_kept([]), mock.patch.object(threads, "platform", arm):
        programs = {name: program_of(callback) for name, callback in callbacks().items()}
    for name, program in programs.items():
        for cpu, triple in TARGETS.items():
            text = program.assembly(triple, cpu)
            yield {
                "kernel": name,
                "cpu": cpu,
                "of_another_machine": sorted(set(re.findall(r"llvm\.x86\.[\w.]+", program.text))),
                "vectors": sum(bool(_VECTORS.search(line)) for line in text.splitlines()),
                "calls": sorted(set(_CALL.findall(text))),
            }


if __name__ == "__main__":
    print_records(records())
