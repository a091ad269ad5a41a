"""What every request body shares: strict types, null as absent, one clear message for what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from app.schemas.json import BodyError, parse_object

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

_OBJECT_TYPES = frozenset(("dict_type", "model_type", "model_attributes_type"))
_SUBJECT = re.compile(r"(Input|Value|String|List|Dictionary) ")


def refuse(kind: str, message: str) -> PydanticCustomError:
    """What a validator raises: ``message`` goes on after the field's name."""
    # the template is ours and never holds input, so that no brace of a client's is formatted
    return PydanticCustomError(kind, message)


def _without_nulls(value: Any) -> Any:
    """JSON's null means that a field was left out."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


class WireModel(BaseModel):
    """Strict types, null as absent, fields that are not known kept aside."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    _drop_nulls = model_validator(mode="before")(_without_nulls)


Body = TypeVar("Body", bound=WireModel)


def parse_body(model: type[Body], raw: bytes) -> Body:
    """The request that a body holds. Raises BodyError, whose message names the first field that is wrong."""
    return check_body(model, parse_object(raw))


def check_body(model: type[Body], value: dict[str, Any]) -> Body:
    """The request that such fields make. Raises BodyError, as above."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _body_error(error.errors(include_url=False, include_input=False)[0]) from None


def _body_error(problem: Mapping[str, Any]) -> BodyError:
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, BodyError):
        return cause
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    if problem["type"] == "missing":
        return BodyError(f"'{param}' is required", param)
    return BodyError(f"'{param}' {_what_it_should_be(problem)}", param)


def _what_it_should_be(problem: Mapping[str, Any]) -> str:
    """pydantic's sentence in the words of JSON, without the name of a class."""
    if problem["type"] in _OBJECT_TYPES:
        return "should be an object"
    sentence, _, _ = str(problem["msg"]).partition(" after validation")
    return _SUBJECT.sub("", sentence, count=1)
