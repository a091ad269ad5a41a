"""Which graph serves which step, when graphs are made, and what happens when one cannot be made; without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.engine.graphs import FIRST_BUCKETS, PATIENCE, GraphSteps, StepOutput, buckets
from mamba_core.ops import Packing
from tests.engine.fakes import BrokenCapturer, HostCapturer


class Body:
    """A step that notes which slots it was run with."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, packing: Packing) -> StepOutput:
        self.calls.append(packing.slots.tolist())
        return StepOutput(torch.zeros(packing.num_rows, 3), packing.slots.clone())


def make_steps(max_rows: int = 300) -> tuple[GraphSteps, Body, HostCapturer, Tensor]:
    body, capturer, slots = Body(), HostCapturer(), torch.zeros(max_rows, dtype=torch.int64)
    steps = GraphSteps(body, slots, capturer)  # type: ignore[arg-type]
    return steps, body, capturer, slots


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 20, 64, 200, 256, 300, 1000, 1024, 5000])
def test_buckets_hold_every_number_of_rows_closely(max_rows: int) -> None:
    sizes = buckets(max_rows)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == max_rows
    for num_rows in range(1, max_rows + 1):
        bucket = min(size for size in sizes if size >= num_rows)
        assert bucket - num_rows < max(8, num_rows / 2)
    assert len(sizes) < 60


def test_all_first_buckets_are_buckets() -> None:
    assert set(FIRST_BUCKETS) <= set(buckets(1024))


def test_a_start_captures_the_largest_first_and_touches_the_scratch_slot_alone() -> None:
    steps, body, _, slots = make_steps()
    slots.copy_(torch.arange(300) + 1)
    steps.start()
    assert slots.tolist() == list(range(1, 301))
    assert steps.captured == (*FIRST_BUCKETS, 300)
    assert len(body.calls[0]) == 300
    assert all(set(call) == {0} for call in body.calls)


def test_a_step_is_served_by_the_smallest_graph_that_holds_it() -> None:
    steps, body, _, slots = make_steps()
    steps.start()
    slots[:2] = torch.tensor([5, 3])
    del body.calls[:]
    output = steps.run(2)
    assert body.calls == [[5, 3, 0, 0, 0, 0, 0, 0]]
    assert output.tokens[:2].tolist() == [5, 3]


def test_idle_moments_fill_in_the_rest_one_by_one() -> None:
    steps, _, capturer, _ = make_steps()
    steps.start()
    missing = len(buckets(300)) - len(FIRST_BUCKETS) - 1
    for _ in range(missing):
        assert steps.prepare_more()
    assert not steps.prepare_more()
    assert steps.captured == buckets(300)
    assert len(capturer.names) == len(buckets(300))


def test_under_load_a_graph_is_captured_once_it_has_been_missed_often_enough() -> None:
    steps, _, _, _ = make_steps()
    steps.start()
    for _ in range(PATIENCE):
        steps.run(3)
    assert 4 not in steps.captured
    steps.run(3)
    assert 4 in steps.captured


@pytest.mark.parametrize("num_good", [0, 1, 2])
def test_without_a_graph_that_is_large_enough_a_step_runs_as_it_is(num_good: int) -> None:
    body, slots = Body(), torch.arange(1, 301)
    steps = GraphSteps(body, slots, BrokenCapturer(num_good))  # type: ignore[arg-type]
    steps.start()
    del body.calls[:]
    for _ in range(2 * PATIENCE):
        steps.run(5)
    # the largest is captured first, then that of one row
    assert {len(call) for call in body.calls} == ({300} if num_good else {5})
    assert not steps.prepare_more()
