"""Decode steps as CUDA graphs, one per number of rows in a list of buckets: a step is then a single launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.capture import Captured, Capturer
from mamba_core.ops import Packing

# captured before the first request, with the largest; a step of rows in between takes the next larger one meanwhile.
# kernels are chosen by the number of rows, and no other bucket needs one that these do not
FIRST_BUCKETS = (1, 8, 16, 32, 64, 128, 256)

# steps that a larger graph has to stand in for before the missing one is captured under load, which costs a pause
PATIENCE = 32


@dataclass(frozen=True, slots=True)
class StepOutput:
    """logits [B, V] float32; tokens [B] int64, BROKEN where the logits were not finite. Until the next step."""

    logits: Tensor
    tokens: Tensor


# what a step of one token for each row of a packing does; all its inputs and outputs are addressed by slot
StepBody = Callable[[Packing], StepOutput]


def nothing(_num_rows: int) -> None:
    """What there is to do before a step where there is nothing."""


class Steps:
    """A step for any number of rows, launched operation by operation. ``slots`` [Bmax] is read at every run."""

    def __init__(self, body: StepBody, slots: Tensor) -> None:
        self._body = body
        self._slots = slots
        self._packings: dict[int, Packing] = {}

    def run(self, num_rows: int, before: Callable[[int], None] = nothing) -> StepOutput:
        """One step of the first ``num_rows`` slots, of whose number ``before`` is told first."""
        if num_rows not in self._packings:
            self._packings[num_rows] = Packing.step(self._slots[:num_rows], may_lag=True)
        before(num_rows)
        return self._body(self._packings[num_rows])

    def start(self) -> None:
        """There is nothing to get ready."""

    def prepare_more(self) -> bool:
        """Whether there was anything to prepare."""
        return False


class GraphSteps:
    """A step for any number of rows as a replay of the smallest graph that holds them.

    Slots beyond the rows of a step must be 0, the scratch slot. What cannot be captured is run operation by operation.
    """

    def __init__(self, body: StepBody, slots: Tensor, capturer: Capturer) -> None:
        self._body = body
        self._slots = slots
        self._capturer = capturer
        self._eager = Steps(body, slots)
        self._buckets = buckets(slots.shape[0])
        self._smallest_bucket = _smallest_buckets(self._buckets)
        self._graphs: dict[int, Captured[StepOutput]] = {}
        # graphs read them
        self._packings: dict[int, Packing] = {}
        self._num_misses: dict[int, int] = {}

    @property
    def captured(self) -> tuple[int, ...]:
        """The numbers of rows for which there are graphs."""
        return tuple(sorted(self._graphs))

    def start(self) -> None:
        """Capture what a start needs; the largest first, since the memory of the others fits into its own."""
        largest = self._buckets[-1]
        for num_rows in (largest, *(bucket for bucket in FIRST_BUCKETS if bucket < largest)):
            self._try_to_capture(num_rows)

    def run(self, num_rows: int, before: Callable[[int], None] = nothing) -> StepOutput:
        """One step of the first ``num_rows`` slots; the output may have more rows, of whose number ``before`` is told
        first.
        """
        found = self._find(num_rows)
        if found is None:
            return self._eager.run(num_rows, before)
        before(found.output.tokens.shape[0])
        self.replay(found.graph)
        return found.output

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch a graph: the seam through which benchmarks watch."""
        graph.replay()

    def prepare_more(self) -> bool:
        """Capture one of the graphs that are missing; whether any was."""
        missing = [bucket for bucket in self._buckets if bucket not in self._graphs]
        if not missing or not self._capturer.can_capture:
            return False
        self._try_to_capture(missing[0])
        return True

    def _find(self, num_rows: int) -> Captured[StepOutput] | None:
        bucket = self._smallest_bucket[num_rows]
        if bucket not in self._graphs:
            self._num_misses[bucket] = self._num_misses.get(bucket, 0) + 1
            if self._num_misses[bucket] > PATIENCE:
                self._try_to_capture(bucket)
        if bucket in self._graphs:
            return self._graphs[bucket]
        larger = [captured for captured in self._graphs if captured > bucket]
        return self._graphs[min(larger)] if larger else None

    def _try_to_capture(self, num_rows: int) -> None:
        if not self._capturer.can_capture:
            return
        packing = self._packings[num_rows] = Packing.step(self._slots[:num_rows], may_lag=True)
        scratch = Packing.step(torch.zeros_like(packing.slots), may_lag=True)

        def step() -> StepOutput:
            output = self._body(packing)
            return StepOutput(self._capturer.borrow(output.logits), output.tokens)

        captured = self._capturer.capture(f"a step of {num_rows} rows", lambda: self._body(scratch), step)
        if captured is not None:
            self._graphs[num_rows] = captured
            self._rehearse(captured)

    def _rehearse(self, captured: Captured[StepOutput]) -> None:
        """Replay once, on the scratch slot: the first time of a graph takes longer than all that follow."""
        slots = self._slots.clone()
        self._slots.zero_()
        captured.graph.replay()
        self._slots.copy_(slots)


def buckets(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that have a graph of their own, ``max_rows`` the last: at most a third more than needed from 8
    rows on.
    """
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 96, 16), *range(96, 256, 32)]
    while (size := sizes[-1] + max(32, 2 ** (sizes[-1].bit_length() - 3))) < max_rows:
        sizes.append(size)
    return (*(size for size in sizes if size < max_rows), max_rows)


def rows_like_first(num_rows: int, max_rows: int) -> int:
    """So many rows or some more, up to ``max_rows``, for which all kernels are made at the start."""
    return min(next((bucket for bucket in FIRST_BUCKETS if num_rows <= bucket), num_rows), max_rows)


def _smallest_buckets(sizes: tuple[int, ...]) -> list[int]:
    """The bucket of each number of rows, from 0 on."""
    smallest = [sizes[0]]
    for size in sizes:
        smallest += [size] * (size + 1 - len(smallest))
    return smallest
