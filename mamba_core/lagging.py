"""Which steps leave states behind by a token, and how states catch up; see ``mamba_core.ops.lag``."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaBlock, MambaModel
from mamba_core.ops.triton import step_lag
from mamba_core.ops.triton.step_tiles import SOME_ROWS


def lags(cache: MambaCache, num_rows: int) -> bool:
    """Whether a step of so many rows leaves states behind, if it may: fewer are faster in ways that do not."""
    return cache.lag is not None and num_rows > SOME_ROWS


class Settler:
    """Gives the states of a cache the tokens that they lack."""

    def __init__(self, model: MambaModel, cache: MambaCache) -> None:
        self._model = model
        self._cache = cache
        self._recurrences: step_lag.Recurrences | None = None

    def lags(self, num_rows: int) -> bool:
        """Whether a step of so many rows leaves states behind, if it may."""
        return lags(self._cache, num_rows)

    def settle(self, slots: Tensor) -> None:
        """Of slots [B] int64, each once, in one launch; those that lack nothing stay as they are."""
        if self._cache.lag is None:
            return
        mixers = [layer.mixer for layer in cast(list[MambaBlock], self._model.layers)]
        decays, biases = [mixer.A() for mixer in mixers], [mixer.dt_proj.bias for mixer in mixers]
        self._recurrences = step_lag.locate(decays, biases, self._recurrences)
        step_lag.settle(self._recurrences, self._cache.ssm, self._cache.lag, slots)
