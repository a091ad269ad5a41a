"""Writes docs/API.md, every route and every field of every body with the test that proves it: ``make docs``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute

from app.api.app import ROUTERS, document
from scripts.json_schema import Node, Schemas, default_of, fields_of, range_of
from scripts.route_tests import find_test, read_tests

API = Path(__file__).resolve().parents[1] / "docs" / "API.md"

_INTRODUCTION = """# The API

<!-- written by `make docs` -->

Every route, and every field of every request body. A field that is left out or null has its default. What a field is not allowed
to be is refused with 400 that names it, before anything is done; so is what is known to OpenAI's API but not served here, and
what nobody knows is ignored. `/openapi.json` of a running server says the same to programs, and [LIMITS.md](LIMITS.md) has the
bounds that an operator sets.

Tests are those of `tests/api`. The last column of a body's table says what its test proves of each field: with the value shown
the outcome **changes** (what the engine is asked, or what is answered), or the request is **refused** by the name of the field, or
the field has **no effect**, as its meaning says.

"""  # noqa: E501 (lines of prose are longer here)
_FIELD_TESTS = """Row by row: `test_fields.py::test_a_field_does_what_it_says[{model}-FIELD]`; types:
`test_fields.py::test_a_wrong_type_is_refused_by_the_name_of_its_field[{model}]`.
"""
_INNER_TESTS = """What stands inside lists and choices:
`test_inner_fields.py::test_inner_fields_do_what_they_say[{model}]`.
"""
_MOST_VALUE_CHARACTERS = 60
# of routes that most tests only pass by
_PROOFS = {
    "/livez": "test_admission.py::test_an_engine_that_hangs",
    "/readyz": "test_admission.py::test_an_engine_that_hangs",
    "/health": "test_admission.py::test_loading_is_503",
}


def render(schema: Node) -> str:
    """The whole file, of an OpenAPI document."""
    routes = list(_operations(schema))
    lines = ["## Routes", "", *_table(("route", "what it does", "statuses", "test"), _route_rows(routes)), ""]
    lines += ["## Headers, and what stands in paths and queries", ""]
    lines += [*_table(("name", "in", "type and range", "meaning", "routes"), _parameter_rows(routes)), ""]
    for route, operation in routes:
        lines += _body(route, operation, schema["components"]["schemas"])
    return _INTRODUCTION + "\n".join(lines)


def _operations(schema: Node) -> Iterator[tuple[str, Node]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def _route_rows(routes: Sequence[tuple[str, Node]]) -> Iterator[tuple[str, ...]]:
    tests, homes = read_tests(), _homes()
    for route, operation in routes:
        method, _, path = route.partition(" ")
        proof = find_test(tests, method, path, homes[path], _PROOFS.get(path))
        statuses = " ".join(sorted(operation["responses"]))
        yield f"`{route}`", operation["summary"], statuses, f"`{proof}`"


def _homes() -> dict[str, str]:
    """For each path the file of tests that is named as the module of the route is."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return {route.path_format: f"test_{route.endpoint.__module__.rpartition('.')[2]}.py" for route in routes}


def _parameter_rows(routes: Sequence[tuple[str, Node]]) -> Iterator[tuple[str, ...]]:
    found: dict[tuple[str, ...], list[str]] = {}
    for route, operation in routes:
        for parameter in operation["parameters"]:
            what = (f"`{parameter['name']}`", parameter["in"], range_of(parameter["schema"]), parameter["description"])
            found.setdefault(what, []).append(f"`{route}`")
    for row, named in found.items():
        yield *row, "all" if len(named) == len(routes) else ", ".join(named)


def _body(route: str, operation: Node, schemas: Schemas) -> list[str]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    if not name:
        return []
    outer, inner = _cases(name)
    proofs = {**outer, **inner}
    rows = (
        (f"`{field.name}`", range_of(field.schema), default_of(field), field.description, _proof(field.name, proofs))
        for field in fields_of(schemas[name], schemas)
    )
    tests = (_FIELD_TESTS + (_INNER_TESTS if inner else "")).format(model=name)
    header = ("field", "type and range", "default", "meaning", "proof")
    return [f"## `{route}`", "", schemas[name]["description"], "", tests, *_table(header, rows), ""]


def _cases(name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the contract tests hold of each field of a body, and of what stands inside those checked by hand."""
    fields, inner = (import_module(f"tests.api.{module}") for module in ("test_fields", "test_inner_fields"))
    outer: Mapping[str, Any] = next((kind.fields for model, kind in fields.KINDS.items() if model.__name__ == name), {})
    tables = [table[name][1] for table in (inner.INNER, inner.CHOICES) if name in table]
    return outer, {field: case for table in tables for field, case in table.items()}


def _proof(name: str, proofs: Mapping[str, Any]) -> str:
    if name not in proofs:
        raise LookupError(f"no test of tests/api has an entry for {name}")
    case = proofs[name]
    verdict = {"Changes": "changes", "Refused": "refused", "NoEffect": "no effect"}[type(case).__name__]
    value = json.dumps(case.value, ensure_ascii=False)
    return f"`{value}`: {verdict}" if len(value) <= _MOST_VALUE_CHARACTERS else verdict


def _table(header: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def main() -> int:
    API.write_text(render(document()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
