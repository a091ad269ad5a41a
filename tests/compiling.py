"""Compiling Triton kernels for a Hopper GPU, which needs none, in a process that does not interpret them.

Triton decides at import whether it interprets or compiles, and tests interpret. So each list of kernels is a program of
its own that prints one line of JSON per kernel; see ``compile_*.py``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

TARGET = GPUTarget("cuda", 90, 32)
ROOT = Path(__file__).parents[1]


def records_of(program: str, cache_dir: Path) -> list[dict[str, Any]]:
    """What a program, named as a module, prints when it compiles with this cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache_dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", program]
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def print_records(records: Iterable[dict[str, Any]]) -> None:
    """What such a program does."""
    for record in records:
        print(json.dumps(record), flush=True)  # noqa: T201  the output is the result


def source_of(
    kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str], *, unaligned: frozenset[str] = frozenset()
) -> ASTSource:
    """The kernel for arguments of these types: bf16 pointers and 32-bit integers where none is named, ``eps`` fp32.

    All but ``eps`` and ``unaligned`` are divisible by 16.
    """
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(index,)] = constants[name]
            continue
        usual = "*bf16" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
        signature[name] = types.get(name, usual)
        if name != "eps" and name not in unaligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return source(fn=kernel, signature=signature, constexprs=values, attrs=attributes)


def compiled_for_hopper(source: ASTSource, **options: Any) -> Any:
    """The compiled kernel, with its intermediate code in ``asm``."""
    return triton.compile(source, target=TARGET, options=options)


def persistent_facts(compiled: Any) -> dict[str, int]:
    """What every kernel is asked that stays for a whole step: how it copies, counts itself and waits for others."""
    assembly = compiled.asm["ptx"]
    return {
        "shared_bytes": compiled.metadata.shared,
        "copies": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", assembly)),
        "narrow_copies": assembly.count("cp.async.ca"),
        "counts": assembly.count("red.release.gpu"),
        "waits": assembly.count("ld.acquire.gpu"),
    }
