"""The grammar that a request demands of its outputs, from whichever of its fields says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from app.engine.request import Grammar
from app.schemas.output_format import NEEDS_ONE, OutputFields, ResponseFormat, StructuredOutputs
from app.serving.errors import InvalidRequest, UnsupportedParameter

# what other servers let one say inside of these fields
_UNSUPPORTED = {
    "response_format": ("schema", "structures", "triggers", "format", "value"),
    "structured_outputs": (
        "structural_tag",
        "whitespace_pattern",
        "disable_any_whitespace",
        "disable_additional_properties",
        "disable_fallback",
    ),
}


def is_constrained(body: OutputFields) -> bool:
    """Whether there is a grammar to be checked, which may take a while."""
    return bool(body.demands)


def grammar_of(body: OutputFields) -> tuple[Grammar, str] | None:
    """The grammar, and the name of the field that has it; None where any text will do. Raises InvalidRequest."""
    demands = body.demands
    if not demands:
        return None
    (name,) = demands
    if name == "response_format":
        assert body.response_format is not None
        return _of_response_format(body.response_format)
    if name == "structured_outputs":
        assert body.structured_outputs is not None
        return _of_structured_outputs(body.structured_outputs)
    return _make(name.removeprefix("guided_"), getattr(body, name), name), name


def _of_response_format(wanted: ResponseFormat) -> tuple[Grammar, str]:
    _refuse_extra("response_format", wanted.model_extra)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        return Grammar("json_object"), "response_format"
    param = "response_format.json_schema.schema"
    return _make("json", wanted.json_schema.schema_, param), param


def _of_structured_outputs(wanted: StructuredOutputs) -> tuple[Grammar, str]:
    _refuse_extra("structured_outputs", wanted.model_extra)
    if not wanted.given:
        raise InvalidRequest(NEEDS_ONE, param="structured_outputs")
    (name,) = wanted.given
    value = getattr(wanted, name)
    name = name.removesuffix("_")
    param = f"structured_outputs.{name}"
    return _make(name, value, param), param


def _make(name: str, value: Any, param: str) -> Grammar:
    if name == "json_object":
        return Grammar("json_object")
    if name == "json":
        return Grammar("json_schema", value if isinstance(value, str) else _to_json(value, param))
    if name == "choice":
        return Grammar("choice", _to_json(value, param))
    return Grammar("regex" if name == "regex" else "grammar", value)


def _to_json(value: dict[str, Any] | Sequence[str], param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise InvalidRequest(f"'{param}' is nested too deeply", param=param) from None


def _refuse_extra(name: str, extra: dict[str, Any] | None) -> None:
    for key, value in (extra or {}).items():
        if key in _UNSUPPORTED[name] and value not in (None, False):
            raise UnsupportedParameter(f"{name}.{key}")
