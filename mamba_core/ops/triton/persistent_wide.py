"""One token each of up to 64 sequences through all layers in a single launch, where weights are large enough to pay."""

from __future__ import annotations

from functools import partial

import triton

from mamba_core.ops.triton import persistent_many
from mamba_core.ops.triton.persistent_many import COPIERS, DEEP, MAX_ROWS, STATES, Plan
from mamba_core.ops.triton.persistent_wide_kernel import persistent_wide_kernel
from mamba_core.ops.triton.persistent_wide_tiles import Sizes

# programs, each on a multiprocessor of its own, and groups of those that share their outputs
PROGRAMS = 128
_GROUPS = 32
# more do not find room in the shared memory of a multiprocessor
_MAX_STAGES = 10


def fits(width: int, rank: int, states: int) -> bool:
    """Whether layers of these sizes can be shared out among the programs."""
    high, low = _outputs(width)
    small_tiles = triton.cdiv(rank + 2 * states, high) + triton.cdiv(rank, DEEP)
    return (
        width % (4 * DEEP) == 0
        and 32 <= high <= 64
        and low in (0, 16)
        and rank % 16 == 0
        and states == STATES
        and (rank + 2 * states) * MAX_ROWS <= 128 * PROGRAMS
        and small_tiles <= _stages(width)
    )


def programs(_width: int) -> int:
    """How many programs a launch has, all of which must run at once: as many for every width."""
    return PROGRAMS


def plan(rows: int, sizes: tuple[int, int, int, int]) -> Plan:
    """How so many rows are launched, for layers of such sizes."""
    width, rank, states, taps = sizes
    return Plan(
        persistent_wide_kernel,
        PROGRAMS,
        _GROUPS,
        sizes_for(rows, width, rank, taps),
        shares=((PROGRAMS, MAX_ROWS, rank + 2 * states),),
        parts=((PROGRAMS // _GROUPS, MAX_ROWS, width),),
    )


step = partial(persistent_many.step, plan)


def sizes_for(rows: int, width: int, rank: int, taps: int) -> Sizes:
    """The sizes of the layers, and how they are shared out, for any kind of model."""
    high, low = _outputs(width)
    stages = _stages(width)
    return Sizes(
        H=width,
        D=2 * width,
        R=rank,
        N=STATES,
        K=taps,
        A=high,
        B=low,
        SPACE=32 if rows <= 32 else 64,
        STAGES=stages,
        COPIERS=COPIERS,
        AHEAD=stages - 2,
        DEPTH=2,
    )


def _stages(width: int) -> int:
    """How many tiles the rings hold: both turn a whole number of times in each of the large products."""
    tiles = width // (2 * DEEP)
    return tiles if tiles <= _MAX_STAGES else tiles // 2


def _outputs(width: int) -> tuple[int, int]:
    """The outputs of a program, as a power of two and the rest."""
    outputs = width // _GROUPS
    high = 1 << max(0, outputs.bit_length() - 1)
    return high, outputs - high
