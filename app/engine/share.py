"""How many prompt tokens a step takes while others stream, so that their tokens keep coming. Pure arithmetic."""

from __future__ import annotations

import math

# where it starts before anything has been measured, and the least there is
FIRST_SHARE = 512
LEAST_SHARE = 64

# what a share may cost in terms of the least share: when most of that is for nothing, fewer tokens are hardly faster
_WORTHWHILE = 1.3

# weight of the newest measurement of a size, so that one slow step does not count for more than it is
_NEWEST = 0.4


class PrefillShare:
    """Aims at the number of prompt tokens that take as long as the rows of a step: such a step lasts twice a step
    without them. What prompt tokens cost is taken for linear and learnt from the sizes seen so far.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._num_tokens = min(budget, FIRST_SHARE)
        # by the nearest power of two: tokens and seconds
        self._measured: dict[int, tuple[float, float]] = {}

    @property
    def num_tokens(self) -> int:
        """A power of two, since such chunks may have graphs of their own, or the budget."""
        return self._num_tokens

    def observe(self, num_tokens: int, prefill_seconds: float, decode_seconds: float) -> None:
        """Learn from a step that took ``num_tokens`` prompt tokens beside its rows."""
        if min(num_tokens, prefill_seconds, decode_seconds) <= 0:
            return
        size = _nearest_power(num_tokens)
        tokens, seconds = self._measured.get(size, (num_tokens, prefill_seconds))
        tokens += _NEWEST * (num_tokens - tokens)
        self._measured[size] = tokens, seconds + _NEWEST * (prefill_seconds - seconds)
        fixed, slope = self._fit()
        target = max(decode_seconds, _WORTHWHILE * (fixed + slope * LEAST_SHARE))
        # one size beyond what has been seen
        most = min(max(2 * max(self._measured), self._num_tokens), self._budget)
        affordable = (target - fixed) / slope if slope * most > target - fixed else most
        wanted = max(_nearest_power(max(affordable, 1)), LEAST_SHARE)
        self._num_tokens = min(wanted, self._budget)

    def _fit(self) -> tuple[float, float]:
        """Seconds of a share of nothing, and of each token: the line of least squares, neither below 0."""
        points = list(self._measured.values())
        mean_tokens, mean_seconds = (sum(values) / len(points) for values in zip(*points, strict=True))
        spread = sum((tokens - mean_tokens) ** 2 for tokens, _ in points)
        if spread > 0:
            slope = sum((t - mean_tokens) * (s - mean_seconds) for t, s in points) / spread
            slope = min(max(slope, 0.0), mean_seconds / mean_tokens)
        else:
            slope = mean_seconds / mean_tokens
        return mean_seconds - slope * mean_tokens, slope


def _nearest_power(number: float) -> int:
    power: int = 2 ** round(math.log2(number))
    return power
