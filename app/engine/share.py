"""How many prompt tokens a step takes while others stream, so that their tokens keep coming. Pure arithmetic."""

from __future__ import annotations

# where it starts before anything has been measured, and the least: below, the weights are read for too few tokens
FIRST_SHARE = 512
LEAST_SHARE = 64

_LARGEST_CHANGE = 2.0


class PrefillShare:
    """Follows the point at which the prompt tokens of a step take as long as its rows: such a step lasts twice a
    step without them.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._least = min(budget, LEAST_SHARE)
        self._share = min(budget, FIRST_SHARE)

    @property
    def num_tokens(self) -> int:
        return self._share

    def observe(self, num_tokens: int, prefill_seconds: float, decode_seconds: float) -> None:
        """Learn from a step that took ``num_tokens`` prompt tokens beside its rows."""
        if min(num_tokens, prefill_seconds, decode_seconds) <= 0:
            return
        change = decode_seconds / prefill_seconds
        if change > 1 and num_tokens < self._share:
            # a step that took less than it might have says nothing about a larger one
            return
        change = max(1 / _LARGEST_CHANGE, min(change, _LARGEST_CHANGE))
        wanted = int(min(num_tokens, self._share) * change)
        # half way, so that one slow step does not count for more than it is
        self._share = max(self._least, min(self._budget, (self._share + wanted + 1) // 2))
