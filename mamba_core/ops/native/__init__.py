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
