"""Which steps leave states behind by a token, and how states catch up; see ``mamba_core.ops.lag``."""

from __future__ import annotations

from torch import Tensor

from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaModel
from mamba_core.ops.triton import step_lag
from mamba_core.ops.triton.step_tiles import is_many
from mamba_core.single_step import located


def lags(cache: MambaCache, num_rows: int) -> bool:
    """Whether a step of so many rows leaves states behind, if it may: fewer are faster in ways that do not."""
    return cache.lag is not None and is_many(num_rows, cache.ssm.shape[2], cache.device)


class Settler:
    """Gives the states of a cache the tokens that they lack."""

    def __init__(self, model: MambaModel, cache: MambaCache) -> None:
        self._model = model
        self._cache = cache

    def lags(self, num_rows: int) -> bool:
        """Whether a step of so many rows leaves states behind, if it may."""
        return lags(self._cache, num_rows)

    def settle(self, slots: Tensor) -> None:
        """Of slots [B] int64, each once, in one launch; those that lack nothing stay as they are."""
        if self._cache.lag is None:
            return
        step_lag.settle(located(self._model), self._cache.ssm, self._cache.lag, slots)
