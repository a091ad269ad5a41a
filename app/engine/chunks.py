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


def chunks_of_rows(plan: StepPlan) -> list[int]:
    """For each row of a step the chunk behind which it starts; nothing unless all of them start behind one.

    What decode would feed such a row can be the last token of its chunk as well.
    """
    index_of = {chunk.prefill: index for index, chunk in enumerate(plan.chunks)}
    found = [
        index_of.get(prefill) for prefill in plan.done if prefill.request.max_tokens > 0 for _ in prefill.sequences
    ]
    indices = [index for index in found if index is not None]
    return indices if len(indices) == len(plan.rows) else []
