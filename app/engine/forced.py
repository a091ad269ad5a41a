"""Tokens that a grammar forces, taken at once: one chunk instead of a step for each.

Where a mask allows a single token, what the model says of it does not matter. When several follow one another, a row
has them all at once, and before it draws again they go through the model together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from app.engine.sequence import Constraint, Forced

# what tokens cost that go through the model before a step, in such steps; on a CPU they go with it, for next to nothing
STEPS_PER_CHUNK = {"cpu": 0.0, "cuda": 1.0}


def take_forced(
    constraints: Iterable[tuple[int, Constraint]], num_rows: int, steps_per_chunk: float
) -> dict[int, Forced]:
    """What is taken at once, by row. ``constraints`` by row, after the masks of a step of ``num_rows`` were written.

    A chunk makes the step of all rows longer, and saves the steps that those whose tokens are forced would need: there
    have to be enough such tokens for so many rows. When there are no other rows, the chunk is that step. What ends a
    sample needs no chunk.
    """
    if steps_per_chunk == math.inf:
        return {}
    taken: dict[int, Forced] = {}
    chosen: list[tuple[int, Constraint]] = []
    num_saved = 0
    for row, constraint in constraints:
        num_tokens, is_end = constraint.outlook
        if is_end:
            run = constraint.run_ahead()
            # there may be several ends of text to choose from
            if run.tokens:
                taken[row] = run
        elif num_tokens > 1:
            chosen.append((row, constraint))
            num_saved += num_tokens - 1
    if len(chosen) == num_rows:
        steps_per_chunk -= 1
    if num_saved > steps_per_chunk * num_rows:
        taken |= {row: constraint.run_ahead() for row, constraint in chosen}
    return taken
