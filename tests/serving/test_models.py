"""The list of models."""

from __future__ import annotations

import pytest

from app.serving.errors import ModelNotFound
from app.serving.limits import ServingLimits
from app.serving.models import ModelCatalog
from tests.fakes import FakeEngine


def test_one_model_under_all_its_names(engine: FakeEngine) -> None:
    catalog = ModelCatalog(engine, ["fox", "wolf"], ServingLimits(max_model_len=50))
    assert [(card.id, card.root) for card in catalog.list().data] == [("fox", "fox"), ("wolf", "fox")]
    card = catalog.get("wolf")
    assert (card.max_model_len, card.state_bytes_per_sequence, card.object) == (50, 4096, "model")
    assert catalog.list().object == "list"


def test_no_limit_is_null(engine: FakeEngine) -> None:
    assert ModelCatalog(engine, ["fox"]).get("fox").max_model_len is None


def test_an_unknown_name(engine: FakeEngine) -> None:
    with pytest.raises(ModelNotFound):
        ModelCatalog(engine, ["fox"]).get("cat")
