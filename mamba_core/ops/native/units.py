"""In which types weights are multiplied on this machine's CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Kind:
    """How weights lie in memory and what they are multiplied with.

    is_float32: whether all but quantized weights are fp32 and not bfloat16. is_int8: whether the large matrices are
    int8. has_pairs: whether the CPU multiplies bfloat16 by bfloat16, has_words: int8 by int16, both adding up pairs;
    else weights are widened to fp32 first.
    """

    is_float32: bool
    is_int8: bool
    has_pairs: bool
    has_words: bool

    @classmethod
    def of(cls, dtype: torch.dtype, weight_dtype: torch.dtype, *, may_use_pairs: bool = True) -> Kind:
        """dtype: of vectors and of dt_proj, float32 or bfloat16; weight_dtype: that one or int8."""
        is_float32, is_int8 = dtype == torch.float32, weight_dtype == torch.int8
        # what does not matter is false, so that it makes no difference
        pairs = may_use_pairs and not is_float32 and has_pairs()
        return cls(is_float32, is_int8, pairs, may_use_pairs and is_int8 and has_words())

    @property
    def units(self) -> tuple[Any, Any, Any, Any]:
        """Numbers whose types tell compiled functions: unit, input_unit, weight_unit, staged_unit of ``run_step``.

        float32 is fp32; uint16 bfloat16 that is multiplied in pairs, int16 bfloat16 that is widened; int8 is multiplied
        by int16, uint8 stands for int8 that is widened.
        """
        unit: Any
        if self.is_float32:
            unit, inputs = np.float32(0), np.float32(0)
        else:
            unit, inputs = (np.uint16(0), np.uint16(0)) if self.has_pairs else (np.int16(0), np.float32(0))
        if not self.is_int8:
            return unit, inputs, unit, inputs
        return unit, inputs, np.int8(0) if self.has_words else np.uint8(0), np.float32(0)

    @property
    def input_bytes(self) -> int:
        return int(self.units[1].itemsize)

    @property
    def staged_bytes(self) -> int:
        return int(self.units[3].itemsize)


def has_pairs() -> bool:
    """Whether this CPU has instructions that multiply pairs of bfloat16 and add them up in fp32."""
    return _has_feature("avx512bf16")


def has_words() -> bool:
    """Whether it has those that multiply pairs of int16 and add them up in int32, 32 at a time."""
    return _has_feature("avx512bw")


@cache
def has_onednn() -> bool:
    """Whether torch has been built with oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def has_avx512_of_amd() -> bool:
    return llvmlite.binding.get_host_cpu_name().startswith("znver") and _has_feature("avx512f")


@cache
def _has_feature(name: str) -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get(name, False))
