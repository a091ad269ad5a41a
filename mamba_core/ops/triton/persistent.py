"""What the kernels share that stay for a whole step: their table, how programs wait for each other, small functions."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# renamed after Triton 3.6
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

# of a thread that copies; the others share what is left
COPIER_REGISTERS = gl.constexpr(56)

# columns of the table of addresses, a row per layer
FIELDS = gl.constexpr(15)
IN_PROJ, X_PROJ, OUT_PROJ, TAPS, CONV_BIAS, DT_PROJ, DT_BIAS, DECAY, SKIP, GAIN, IN_BIAS, OUT_BIAS = (
    gl.constexpr(i) for i in range(12)
)
IN_SCALES, X_SCALES, OUT_SCALES = (gl.constexpr(i) for i in range(12, 15))


class Begin(NamedTuple):
    """What a step begins with: pointers to its tokens, to all embeddings, and to the gain of the first norm."""

    tokens: Any
    embeddings: Any
    gain: Any


class States(NamedTuple):
    """Where states are: pointers to the first layer's, how far layers and slots lie apart, and the rows' slots."""

    conv: Any
    ssm: Any
    conv_layer_stride: Any
    conv_stride: Any
    ssm_layer_stride: Any
    ssm_stride: Any
    slots: Any


# one thread counts its program; the barrier before it has collected what the others wrote
_COUNT = gl.constexpr("""
{
    .reg .pred is_other;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.ne.u32 is_other, thread, 0;
    @!is_other red.release.gpu.global.add.s32 [$1], 1;
    mov.u32 $0, 0;
}
""")
# one thread polls, and gives up after some ten seconds: a program that never comes is an error, not a reason to wait
_AWAIT = gl.constexpr("""
{
    .reg .pred is_done;
    .reg .u32 thread;
    .reg .s32 count, polls;
    mov.u32 thread, %tid.x;
    mov.s32 polls, 0;
    setp.ne.u32 is_done, thread, 0;
    @is_done bra CAME;
POLL:
    ld.acquire.gpu.global.s32 count, [$1];
    setp.ge.s32 is_done, count, $2;
    @is_done bra CAME;
    add.s32 polls, polls, 1;
    setp.lt.s32 is_done, polls, 16777216;
    @is_done bra POLL;
    trap;
CAME:
    mov.u32 $0, 0;
}
""")


@gluon.jit
def _view(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    if _HAS_REINTERPRET:
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:  # noqa: RET505  what is not there must not be compiled
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def _count(counter_ptr):
    _barrier()
    gl.inline_asm_elementwise(_COUNT, "=r,l", [counter_ptr], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _await(counter_ptr, target):
    gl.inline_asm_elementwise(_AWAIT, "=r,l,r", [counter_ptr, target], dtype=gl.int32, is_pure=False, pack=1)
    _barrier()


@gluon.jit
def _leave(counter_ptr, target, PROGRAMS: gl.constexpr):
    """Nobody waits any more: the last program leaves the counter as it was. target: what was awaited last."""
    if gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == target + PROGRAMS - 1:
        gl.store(counter_ptr, 0)


@gluon.jit
def _barriers(STAGES: gl.constexpr, COPIERS: gl.constexpr):
    """Those of a ring of so many stages: which of them so many warps have filled, and which are free again."""
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=COPIERS * 32)
        mbarrier.init(freed.index(i), count=1)
    return filled, freed


@gluon.jit
def _sigmoid(v):
    return 1.0 / (1.0 + gl.exp(-v))


@gluon.jit
def _softplus(v):
    e = gl.exp(-gl.abs(v))
    w = 1.0 + e
    log1p = gl.where(w == 1.0, e, gl.log(w) * (e / gl.where(w == 1.0, 1.0, w - 1.0)))
    return gl.maximum(v, 0.0) + log1p


@gluon.jit
def _bf16(address):
    return address.to(gl.pointer_type(gl.bfloat16))


@gluon.jit
def _share(rows: gl.constexpr, PROGRAMS: gl.constexpr):
    """The first of this program's rows, and how many they are."""
    pid = gl.program_id(0)
    first = pid * rows // PROGRAMS
    return first, (pid + 1) * rows // PROGRAMS - first


@gluon.jit
def _next(at, STAGES: gl.constexpr):
    """The slot after this one, and the parity of its turn."""
    slot, turn = at
    is_last = slot == STAGES - 1
    return gl.where(is_last, 0, slot + 1), gl.where(is_last, turn ^ 1, turn)
