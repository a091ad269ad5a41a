"""How far a run has come and what learning rate that means; a budget of seconds always ends cooled down."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """What a whole run may use, resumed parts included: seconds of training, or steps. One of them is None."""

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError("a budget is either of seconds or of steps")

    def fraction(self, elapsed_seconds: float, steps: int) -> float:
        """The share used, 0 to 1."""
        used = steps / self.steps if self.steps is not None else elapsed_seconds / (self.seconds or math.inf)
        return min(1.0, used)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up to ``peak``, then a cosine down to ``peak * floor_share`` at the end of the budget."""

    peak: float
    warmup_share: float = 0.02
    floor_share: float = 0.01

    def learning_rate(self, fraction: float) -> float:
        """The learning rate when ``fraction`` of the budget is used."""
        if fraction < self.warmup_share:
            return self.peak * max(fraction / self.warmup_share, self.floor_share)
        progress = min(1.0, (fraction - self.warmup_share) / (1 - self.warmup_share))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * (self.floor_share + (1 - self.floor_share) * cosine)
