"""The decode step on a CPU, compiled by numba when it is first made."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def is_available() -> bool:
    """Whether there is a compiler to make it with."""
    return importlib.util.find_spec("numba") is not None


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 weights cost no more arithmetic than fp32 ones on this CPU."""
    if not is_available():
        return False
    from mamba_core.ops.native.units import has_pairs

    return has_pairs()


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 faster than MKL, torch's choice, which uses AVX-512 on no CPU but Intel's."""
    if not is_available():
        return False
    from mamba_core.ops.native.units import has_avx512_of_amd, has_onednn

    return has_onednn() and has_avx512_of_amd()
