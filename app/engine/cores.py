"""How many threads are worth having: the cores that this process may use, and may use all the time."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores among those the process may run on, or as many as its control group's share of time is worth.

    Two threads of one core would wait for each other's arithmetic, and threads beyond the share of time would be
    stopped while the others wait for them. root: where the files of the system are.
    """
    numbers = _allowed()
    cores = len({_core(root, number) for number in numbers})
    shares = [share for share in (_share(root), _old_share(root)) if share is not None]
    return max(1, min(cores, *(int(share) for share in shares))) if shares else cores


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core(root: Path, number: int) -> str:
    """The threads of the processor that share a core with this one; a core of its own where nothing is known."""
    path = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
    return _read(path) or f"only {number}"


def _share(root: Path) -> float | None:
    """Cores' worth of time in cgroup version 2, where the process sees its own group as the root."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _old_share(root: Path) -> float | None:
    quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
