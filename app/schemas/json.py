"""Strict JSON: one meaning per body, whatever parser looked at it before."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


class BodyError(ValueError):
    """A body that is refused. ``param`` names the field, where one is to blame; ``message`` is for the client."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that ``raw`` holds. Raises BodyError.

    Refuses what parsers disagree about: invalid UTF-8, duplicate keys at any depth, lone surrogates, NaN, Infinity,
    numbers beyond a double, integers of thousands of digits, nesting beyond the recursion limit, a byte order mark.
    """
    try:
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
        # only an escape can name a surrogate once the bytes are valid UTF-8; pairs have been joined by now
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except BodyError:
        raise
    except UnicodeDecodeError:
        raise BodyError("the body is not valid UTF-8") from None
    except UnicodeEncodeError:
        raise BodyError("the body holds half a surrogate pair") from None
    except RecursionError:
        raise BodyError("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BodyError(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise BodyError("the body holds an integer with too many digits") from None
    if not isinstance(value, dict):
        raise BodyError("the body should be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                name = key if len(key) <= 64 and key.isprintable() else "..."
                raise BodyError(f"the key '{name}' stands twice in one object", param=name)
            seen.add(key)
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise BodyError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise BodyError("the body holds a number that is too large")
    return number


# making one takes as long as reading a short body
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
