"""What a profile of a step tells about its kernels."""

from __future__ import annotations

import pytest

from benchmarks.step import Kernel, delays


def replayed(step: list[tuple[str, float]], replays: int) -> list[Kernel]:
    """A step's kernels with what each adds, the last one first."""
    kernels, now = [], 0.0
    for _ in range(replays):
        for name, us in step:
            now += us
            kernels.append(Kernel(now, name))
    return kernels[::-1]


def test_a_kernel_adds_what_it_ends_later_than_the_one_before() -> None:
    layers = [[("in", 4.0), ("out", 2.0)], [("in", 6.0), ("out", 3.0)]]
    step = [("embed", 9.0), *layers[0], *layers[1], ("turn", 8.0)]
    assert delays(replayed(step, 3), 3, 2) == [("in", 5.0), ("out", 2.5)]
    assert delays(replayed(step[:-1], 3), 3, 2) == [("in", 5.0), ("out", 2.5)]


def test_a_step_of_few_kernels_is_told_as_it_is() -> None:
    step = [("all layers", 90.0), ("norm", 2.0)]
    assert delays(replayed(step, 2), 2, 24) == step


def test_kernels_of_part_of_a_replay_are_refused() -> None:
    with pytest.raises(ValueError, match="5 kernels"):
        delays(replayed([("in", 1.0)], 5), 2, 1)
