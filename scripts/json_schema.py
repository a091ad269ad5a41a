"""What a JSON schema says of its fields, in words for a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Node = dict[str, Any]
Schemas = Mapping[str, Node]

# what is beyond every number that somebody would write is told as a power
_POWERS = {sign * 2**bits + offset: bits for bits in (31, 63) for sign, offset in ((1, -1), (-1, 0))}


@dataclass(frozen=True, slots=True)
class Field:
    """One field, with the names of all that it stands in: ``messages[].content[].text``."""

    name: str
    schema: Node
    is_required: bool

    @property
    def description(self) -> str:
        """Its meaning; of a field that several forms of an object have, all meanings."""
        own = self.schema.get("description")
        told = [own] if own else [form["description"] for form in _forms(self.schema) if "description" in form]
        return "; ".join(dict.fromkeys(told))


def fields_of(schema: Node, schemas: Schemas, prefix: str = "") -> Iterator[Field]:
    """All fields of an object, those that are required first, each before those of the objects inside it."""
    found: dict[str, list[Node]] = {}
    required = [set(form.get("required", ())) for form in _resolved(schema, schemas) if "properties" in form]
    for form in _resolved(schema, schemas):
        for name, content in form.get("properties", {}).items():
            found.setdefault(name, []).append(content)
    needed = {name for name in found if all(name in names for names in required)}
    for name, contents in sorted(found.items(), key=lambda item: item[0] not in needed):
        content = contents[0] if len(contents) == 1 else {"anyOf": contents}
        yield Field(prefix + name, content, name in needed)
        yield from fields_of(content, schemas, f"{prefix}{name}.")
        items = [form["items"] for form in _resolved(content, schemas) if "items" in form]
        if items:
            yield from fields_of({"anyOf": items}, schemas, f"{prefix}{name}[].")


def range_of(schema: Node) -> str:
    """Type and range: ``list (at most 4) of string (1 to 256 characters)``."""
    forms = [_form(node) for node in _forms(schema) if node.get("type") != "null"]
    return " or ".join(dict.fromkeys(forms))


def default_of(field: Field) -> str:
    """What holds where the field is left out, or that it may not be."""
    if field.is_required:
        return "required"
    default = field.schema.get("default")
    return "" if default is None else f"`{json.dumps(default)}`"


def _forms(schema: Node) -> Iterator[Node]:
    """The alternatives that a value may take, those within alternatives too."""
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if alternatives is None:
        yield schema
    for alternative in alternatives or ():
        yield from _forms(alternative)


def _resolved(schema: Node, schemas: Schemas) -> Iterator[Node]:
    for form in _forms(schema):
        if "$ref" in form:
            yield from _resolved(schemas[form["$ref"].rpartition("/")[2]], schemas)
        else:
            yield form


def _form(node: Node) -> str:
    if "const" in node:
        return f"`{json.dumps(node['const'])}`"
    if "enum" in node:
        return " or ".join(f"`{json.dumps(value)}`" for value in node["enum"])
    kind = "object" if "$ref" in node else str(node.get("type", "anything"))
    inner = node.get("items") if kind == "array" else node.get("additionalProperties") if kind == "object" else None
    text = ("list" if kind == "array" else kind) + _bounds(node)
    return f"{text} of {range_of(inner)}" if isinstance(inner, dict) and inner else text


def _bounds(node: Node) -> str:
    lowest = next((node[key] for key in ("minimum", "minLength", "minItems", "minProperties") if key in node), None)
    highest = next((node[key] for key in ("maximum", "maxLength", "maxItems", "maxProperties") if key in node), None)
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    unit = " characters" if node.get("type") == "string" else ""
    parts = []
    if highest is None and (node.get("minLength"), node.get("minItems")) in ((1, None), (None, 1)):
        parts.append("not empty")
    elif lowest is not None and highest is not None:
        parts.append(f"{_number(lowest)} to {_number(highest)}{unit}")
    else:
        limits = {"above": above, "at least": lowest, "below": below, "at most": highest}
        parts += [f"{word} {_number(limit)}{unit}" for word, limit in limits.items() if limit is not None]
    if "pattern" in node:
        parts.append(f"`{node['pattern']}`")
    return f" ({', '.join(parts)})" if parts else ""


def _number(value: float) -> str:
    bits = _POWERS.get(value)
    if bits is None:
        return f"{value:g}" if isinstance(value, float) else str(value)
    return f"2^{bits} - 1" if value > 0 else f"-2^{bits}"
