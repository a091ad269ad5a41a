"""In which types weights are multiplied on this machine's CPU."""

from __future__ import annotations

from enum import Enum

import llvmlite.binding
import torch


class Kind(Enum):
    """How weights lie in memory and what they are multiplied with.

    In compiled functions each kind is two numbers whose types alone count, ``unit`` and ``input_unit``: float32 is
    fp32; uint16 is bfloat16 that the CPU multiplies in pairs; int16 is bfloat16 that is widened to fp32 first.
    """

    FLOAT32 = "float32"
    PAIRS = "bfloat16 by bfloat16"
    WIDENED = "bfloat16 by float32"

    @classmethod
    def of(cls, dtype: torch.dtype, *, has_pairs: bool) -> Kind:
        """For weights of this type, float32 or bfloat16."""
        if dtype == torch.float32:
            return cls.FLOAT32
        return cls.PAIRS if has_pairs else cls.WIDENED

    @property
    def input_bytes(self) -> int:
        return 2 if self is Kind.PAIRS else 4


def has_pairs() -> bool:
    """Whether this CPU has instructions that multiply pairs of bfloat16 and add them up in fp32."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))
