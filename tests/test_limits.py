"""docs/LIMITS.md is written from the code, and holds every bound that the code has."""

from __future__ import annotations

import pkgutil
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import app.schemas
from app.api.protocol import ConnectionLimits
from app.keys import KeyLimits
from app.serving.limits import ServingLimits
from app.settings import Settings
from scripts.limits_table import FIELDS, LIMITS, Limit, limits, render


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
    declared = set()
    for module in pkgutil.iter_modules(app.schemas.__path__):
        names = vars(import_module(f"app.schemas.{module.name}"))
        source = Path(app.schemas.__path__[0], f"{module.name}.py").read_text(encoding="utf-8")
        declared |= {f"{module.name}.{name}" for name in names if re.search(rf"^{name} = ", source, re.M)}
    assert {name for name in declared if ".MAX_" in name} == set(FIELDS)
    values = [row.value for row in rows() if row.setting is None]
    for limit in (*fields(ServingLimits), *fields(ConnectionLimits)):
        assert limit.name in Settings.model_fields or str(limit.default) in values, limit.name


def test_a_row_tells_its_setting() -> None:
    assert Limit("a", "b", "max_n").render() == "| a | 64 | `--max-n` | b |"
    assert Limit("a", "b", "max_model_len").render() == "| a | none | `--max-model-len` | b |"
    assert Limit("a", "b", "max_body_size").render() == "| a | 16.0MiB | `--max-body-size` | b |"
    assert Limit("a", "b", value="5").render() == "| a | 5 | fixed | b |"
