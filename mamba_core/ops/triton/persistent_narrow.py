"""One token each of up to 64 sequences through all layers of a narrow model in a single launch."""

from __future__ import annotations

from functools import partial

from mamba_core.ops.triton import persistent_many
from mamba_core.ops.triton.persistent_many import COPIERS, DEEP, MAX_ROWS, STATES, Plan
from mamba_core.ops.triton.persistent_narrow_kernel import persistent_narrow_kernel
from mamba_core.ops.triton.persistent_step import WARPS
from mamba_core.ops.triton.persistent_wide_tiles import Sizes

# programs of a group, which share its outputs; those of a program; columns that its warps take at a time
_SPLITS = 4
_OUTPUTS = 32
_WIDE = 512
# shared memory of a multiprocessor, less what the barriers and the compiler need
_SHARED_BYTES = 227 * 1024 - 2048


def fits(width: int, rank: int, states: int) -> bool:
    """Whether layers of these sizes can be shared out among the programs."""
    low_programs = (rank + 2 * states) // 16 * (MAX_ROWS // 8)
    return (
        width % (_WIDE // 2) == 0
        and rank % 16 == 0
        and rank <= DEEP
        and states == STATES
        and low_programs <= programs(width)
        and width // _OUTPUTS <= 32
        and _stages(width) > 1
    )


def programs(width: int) -> int:
    """How many programs a launch has, all of which must run at once."""
    return _SPLITS * (width // _OUTPUTS)


def plan(rows: int, sizes: tuple[int, int, int, int]) -> Plan:
    """How so many rows are launched, for layers of such sizes."""
    width, rank, _, taps = sizes
    return Plan(persistent_narrow_kernel, programs(width), width // _OUTPUTS, sizes_for(rows, width, rank, taps))


step = partial(persistent_many.step, plan)


def sizes_for(rows: int, width: int, rank: int, taps: int) -> Sizes:
    """The sizes of the layers, and how they are shared out, for any kind of model."""
    space = 32 if rows <= 32 else MAX_ROWS
    stages = _stages(width)
    return Sizes(
        H=width,
        D=2 * width,
        R=rank,
        N=STATES,
        K=taps,
        A=_OUTPUTS,
        B=0,
        SPACE=space,
        STAGES=stages,
        COPIERS=COPIERS,
        AHEAD=3,
        DEPTH=space // 16,
    )


def _stages(width: int) -> int:
    """How many tiles the rings hold, which turn a whole number of times: as many as there is room for."""
    outs = _OUTPUTS * 2 * width * 2
    kept = MAX_ROWS * (_OUTPUTS * (4 + 1 + 2 + 2 + 1) + 2 * STATES * 4) + WARPS * _OUTPUTS * (MAX_ROWS // _SPLITS) * 4
    most = (_SHARED_BYTES - outs - kept) // ((MAX_ROWS + _OUTPUTS) * DEEP * 2)
    return max((i for i in range(1, most + 1) if width // DEEP % i == 0), default=0)
