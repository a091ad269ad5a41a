"""How many sequences run at once: as many states as fit into a share of the memory that is free."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

MAX_AUTO_SEQS = {"cpu": 64, "cuda": 1024}

# parameters of glibc's mallopt(3), and values for them: 32 MiB is the most it takes for the first
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -3, 32 * 2**20
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 256 * 2**20


class MemoryTooSmall(Exception):
    """Not even one state fits; the message says what to change."""


def choose_max_num_seqs(device: torch.device, bytes_per_slot: int, fraction: float) -> int:
    """Sequences whose states fit into ``fraction`` of the free memory, within reason for the kind of device.

    Call it after the weights are loaded. Raises MemoryTooSmall.
    """
    available = int(free_memory(device) * fraction)
    # one slot more than there are sequences: the scratch slot
    fitting = available // bytes_per_slot - 1
    if fitting < 1:
        raise MemoryTooSmall(
            f"a state takes {bytes_per_slot / 2**20:.1f} MiB and {available / 2**20:.0f} MiB are available for states: "
            "raise memory_fraction or take a smaller model"
        )
    return min(fitting, MAX_AUTO_SEQS.get(device.type, MAX_AUTO_SEQS["cpu"]))


def keep_freed_memory() -> bool:
    """Let this process keep memory that tensors on the CPU free; whether the C library could be told.

    glibc gives a freed block of megabytes back to the system at once, and the next step of the same shape pays for
    every page of it again: measured, three quarters of the time of drawing tokens for 16 rows of 50,280 logits.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on a CPU also within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    candidates = [_meminfo_available() or free, _cgroup_free(Path("/sys/fs/cgroup"))]
    return min(candidate for candidate in candidates if candidate is not None)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _cgroup_free(root: Path) -> int | None:
    """Bytes left under the limit of a version 2 control group; None where there is none."""
    try:
        limit, used = ((root / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - int(used), 0)
