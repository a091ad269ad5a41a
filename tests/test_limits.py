"""docs/LIMITS.md is written from the code, and holds every bound that the code has."""

from __future__ import annotations

import pkgutil
from dataclasses import fields
from importlib import import_module

import app.schemas
from app.api.protocol import ConnectionLimits
from app.keys import KeyLimits
from app.serving.limits import ServingLimits
from app.settings import Settings
from scripts.limits_table import LIMITS, Limit, limits, render


def rows() -> list[Limit]:
    return [row for group in limits().values() for row in group]


def test_it_is_current() -> None:
    assert render(limits()) == LIMITS.read_text(encoding="utf-8"), "run `make docs`"


def test_every_setting_that_limits_is_in_it() -> None:
    groups = {name: field.json_schema_extra for name, field in Settings.model_fields.items()}
    limiting = {name for name, extra in groups.items() if isinstance(extra, dict) and extra["group"] == "Limits"}
    assert {f"key_{field.name}" for field in fields(KeyLimits)} <= limiting
    assert limiting | {"max_model_len", "max_num_seqs"} <= {row.setting for row in rows()}


def test_every_constant_that_limits_is_in_it() -> None:
    values = [row.value for row in rows() if row.setting is None]
    for module in pkgutil.iter_modules(app.schemas.__path__):
        for name, value in vars(import_module(f"app.schemas.{module.name}")).items():
            if name.startswith("MAX_"):
                assert str(value) in values, f"{module.name}.{name}"
    for limit in fields(ServingLimits):
        assert limit.name in Settings.model_fields or str(limit.default) in values, limit.name
    for limit in fields(ConnectionLimits):
        assert limit.name in Settings.model_fields or str(limit.default) in values, limit.name


def test_a_row_tells_its_setting() -> None:
    assert Limit("a", "b", "max_n").render() == "| a | 64 | `--max-n` | b |"
    assert Limit("a", "b", "max_model_len").render() == "| a | none | `--max-model-len` | b |"
    assert Limit("a", "b", "max_body_size").render() == "| a | 16.0MiB | `--max-body-size` | b |"
    assert Limit("a", "b", value="5").render() == "| a | 5 | fixed | b |"
