"""Chunks of prompts end to end, as a model takes them."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from app.engine.sequence import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class PackedChunks:
    """tokens: those of all chunks. slots: what each continues. bounds: where each begins, and the end."""

    tokens: array[int]
    slots: array[int]
    bounds: array[int]

    @property
    def longest(self) -> int:
        return max(end - begin for begin, end in pairwise(self.bounds))


def pack(chunks: tuple[Chunk, ...], prolonged: Collection[int] = ()) -> PackedChunks:
    """All of them, the ``prolonged`` ones, by index, with the token that follows."""
    tokens, bounds = array("q"), array("q", [0])
    for index, chunk in enumerate(chunks):
        tokens += chunk.prefill.tokens[chunk.start : chunk.end + (index in prolonged)]
        bounds.append(len(tokens))
    return PackedChunks(tokens, array("q", (chunk.prefill.slot for chunk in chunks)), bounds)


def chunks_of_rows(plan: StepPlan, chunks: tuple[Chunk, ...]) -> list[int]:
    """For each row of a step the one of these chunks behind which it draws; nothing unless all of them have one.

    What decode would feed such a row can be the last token of its chunk as well.
    """
    index_of = {chunk.prefill: index for index, chunk in enumerate(chunks)}
    behind = {
        sequence: index_of[prefill]
        for prefill in (*plan.done, *(chunk.prefill for chunk in plan.missing))
        if prefill in index_of and prefill.request.max_tokens > 0
        for sequence in prefill.sequences
    }
    return [behind[sequence] for sequence in plan.rows] if len(behind) == len(plan.rows) else []
