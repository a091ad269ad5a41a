"""Kernels of a CPU compiled for CPUs other than this one: to be run, where it understands them, or read."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import llvmlite.binding as llvm
import numba
from numba.core.codegen import CPUCodeLibrary

from mamba_core.ops.native.callbacks import head_callback, step_callback
from mamba_core.ops.native.units import Kind

# of weights in fp32, bfloat16, and int8 beside bfloat16, with no instructions but those of every CPU
PLAIN_KINDS = (
    Kind(is_float32=True, is_int8=False, has_pairs=False, has_words=False),
    Kind(is_float32=False, is_int8=False, has_pairs=False, has_words=False),
    Kind(is_float32=False, is_int8=True, has_pairs=False, has_words=False),
)


@dataclass(frozen=True, slots=True)
class Program:
    """A C function and all that it calls, in LLVM's language, before it was made better for any machine."""

    name: str
    text: str

    def module_for(self, machine: llvm.TargetMachine, triple: str) -> llvm.ModuleRef:
        """The program as numba would hand it to the code generator of a machine."""
        lines = (line for line in self.text.splitlines() if not line.startswith(("target triple", "target datalayout")))
        module = llvm.parse_assembly("\n".join(lines))
        module.triple, module.data_layout = triple, str(machine.target_data)
        for level in (0, 3):
            options = llvm.create_pipeline_tuning_options(speed_level=level)
            options.loop_vectorization = options.slp_vectorization = level == 3
            builder = llvm.create_pass_builder(machine, options)
            builder.getModulePassManager().run(module, builder)
        module.verify()
        return module

    def assembly(self, triple: str, cpu: str) -> str:
        machine = target_machine(triple, cpu, "default")
        return str(machine.emit_assembly(self.module_for(machine, triple)))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A program that can be called, as numba's callbacks can."""

    address: int
    engine: Any = field(repr=False)

    @classmethod
    def of(cls, program: Program, cpu: str) -> Loaded:
        triple = llvm.get_process_triple()
        machine = target_machine(triple, cpu, "jitdefault")
        engine = llvm.create_mcjit_compiler(program.module_for(machine, triple), machine)
        engine.finalize_object()
        return cls(engine.get_function_address(program.name), engine)

    @property
    def ctypes(self) -> Any:
        return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(self.address)


def target_machine(triple: str, cpu: str, code_model: str) -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3, codemodel=code_model)


@contextmanager
def programs_kept(kept: list[str]) -> Iterator[None]:
    """Keep what numba links, and let it link what it has compiled, as it was before this machine's code was made."""
    optimize = CPUCodeLibrary._optimize_final_module

    def keep(library: Any) -> None:
        kept.append(str(library._final_module))
        shared = library._final_module.clone()
        for function in shared.functions:
            if not function.is_declaration and function.linkage == llvm.Linkage.external:
                function.linkage = "linkonce_odr"
        library._shared_module = shared
        optimize(library)

    with mock.patch.object(CPUCodeLibrary, "_optimize_final_module", keep):
        yield


@cache
def program_of(callback: Any) -> Program:
    kept: list[str] = []
    with programs_kept(kept):
        again = numba.cfunc(callback._sig, error_model="numpy")(callback._pyfunc)
    return Program(again._wrapper_name, next(text for text in kept if f"define i64 @{again._wrapper_name}(" in text))


@cache
def loaded_step(kind: Kind, cpu: str) -> Loaded:
    return Loaded.of(program_of(step_callback(kind)), cpu)


@cache
def loaded_head(kind: Kind, cpu: str) -> Loaded:
    return Loaded.of(program_of(head_callback(kind)), cpu)
