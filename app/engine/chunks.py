"""Chunks of prompts end to end, as a model takes them."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from app.engine.sequence import Chunk, Prefill, StepPlan

# tokens of a prompt, besides its last, that are taken faster one after the other as rows of a step than by the scan
MOST_IN_STEPS = 64
# tokens of one such pass, for which room is kept
MOST_TOGETHER = 128


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


@dataclass(frozen=True, slots=True)
class Ways:
    """How the chunks of a step go where a step comes to the same however it is put together.

    by_scan: parts of chunks, by index. in_steps: what is taken as rows of steps after that, pass by pass. with_rows:
    likewise, but in the same pass as the tokens behind which rows draw.
    """

    by_scan: dict[int, Chunk]
    in_steps: list[list[Chunk]]
    with_rows: tuple[Chunk, ...]


def ways_of(plan: StepPlan) -> Ways:
    """A long prompt goes by the scan; a short one, and what follows a prompt, as decode would take it.

    So the way of a token depends on its own request alone, and tokens that were taken at once, or are computed again,
    come to what they come to when they are drawn.
    """
    by_scan: dict[int, Chunk] = {}
    in_steps: list[Chunk] = []
    with_rows = list(plan.missing)
    done = set(plan.done)
    for index, chunk in enumerate(plan.chunks):
        prefill = chunk.prefill
        boundary = max(chunk.start, min(chunk.end, _num_scanned(prefill)))
        if boundary > chunk.start:
            by_scan[index] = Chunk(prefill, chunk.start, boundary)
        if boundary < chunk.end:
            is_alone = prefill in done and len(prefill.sequences) == 1 and prefill.request.max_tokens > 0
            (with_rows if is_alone else in_steps).append(Chunk(prefill, boundary, chunk.end))
    if sum(chunk.end - chunk.start for chunk in with_rows) > MOST_TOGETHER:
        in_steps += with_rows
        with_rows = []
    return Ways(by_scan, _passes(in_steps), tuple(with_rows))


def _passes(chunks: list[Chunk]) -> list[list[Chunk]]:
    """The same tokens in the same order, cut into passes of as many as go together."""
    passes: list[list[Chunk]] = []
    room = 0
    for chunk in chunks:
        start = chunk.start
        while start < chunk.end:
            if room == 0:
                passes.append([])
                room = MOST_TOGETHER
            end = min(start + room, chunk.end)
            passes[-1].append(Chunk(chunk.prefill, start, end))
            room -= end - start
            start = end
    return passes


def _num_scanned(prefill: Prefill) -> int:
    """Tokens of a prefill, from the first, that go by the scan."""
    request = prefill.request
    if request.prompt_logprobs is not None:
        return prefill.num_tokens
    num_tokens = len(request.prompt_token_ids) - 1
    return num_tokens if num_tokens > MOST_IN_STEPS else 0
