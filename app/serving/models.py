"""Which models there are: one model under all its names."""

from __future__ import annotations

import time
from collections.abc import Sequence

from app.engine.interface import EngineClient, EngineError
from app.schemas.models import ModelCard, ModelList
from app.serving.errors import ModelNotFound, Unavailable
from app.serving.limits import ServingLimits


class ModelCatalog:
    """The cards of the served model. Raises Unavailable while it is not loaded."""

    def __init__(self, engine: EngineClient, model_names: Sequence[str], limits: ServingLimits | None = None) -> None:
        self._engine = engine
        self._names = tuple(model_names)
        self._limits = limits or ServingLimits()
        self._created = int(time.time())

    def list(self) -> ModelList:
        """All names, the main one first."""
        return ModelList(data=[self._card(name) for name in self._names])

    def get(self, name: str) -> ModelCard:
        """One name. Raises ModelNotFound."""
        if name not in self._names:
            raise ModelNotFound(name)
        return self._card(name)

    def _card(self, name: str) -> ModelCard:
        try:
            info = self._engine.info
        except EngineError as error:
            raise Unavailable("the model is not loaded yet") from error
        return ModelCard(
            id=name,
            created=self._created,
            root=self._names[0],
            max_model_len=self._limits.max_model_len,
            state_bytes_per_sequence=info.state_bytes_per_seq,
        )
