"""docs/API.md is written from the app and the contract test, and its words are those of the schemas."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from app.api.app import document
from scripts.api_table import API, render
from scripts.json_schema import default_of, fields_of, range_of
from scripts.route_tests import TESTS, Called, find_test, read_tests
from tests.api.test_fields import KINDS

TEST = "import httpx\n\n\ndef call(path):\n    return httpx.get(f'/kept/{path}')\n\n\n"


def test_it_is_current() -> None:
    assert render(document()) == API.read_text(encoding="utf-8"), "run `make docs`"


def test_every_route_and_field_is_in_it() -> None:
    text = API.read_text(encoding="utf-8")
    schema = document()
    for path, methods in schema["paths"].items():
        for method in methods:
            assert text.count(f"\n| `{method.upper()} {path}` |") == 1
    for model, kind in KINDS.items():
        section = text.split(f"\n## `POST {kind.path}`\n")[1].split("\n## ")[0]
        assert model.__name__ in section
        missing = [name for name in kind.fields if f"\n| `{name}` |" not in section]
        assert missing == []
        schemas = schema["components"]["schemas"]
        assert [field.name for field in fields_of(schemas[model.__name__], schemas) if not field.description] == []


def test_every_test_that_it_names_exists() -> None:
    text = API.read_text(encoding="utf-8")
    named = {word for line in text.splitlines() for word in line.split("`") if word.startswith("test_")}
    assert len(named) > 10
    for name in named:
        file, _, function = name.partition("::")
        defined = {getattr(node, "name", "") for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body}
        assert function.partition("[")[0] in defined


def test_a_field_that_no_test_proves_is_an_error() -> None:
    schema = document()
    schema["components"]["schemas"]["DetokenizeRequest"]["properties"]["more"] = {"type": "string"}
    with pytest.raises(LookupError, match="has an entry for more"):
        render(schema)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}, "integer (-2^31 to 2^31 - 1)"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "number (above 0, at most 0.5)"),
        ({"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]}, "string (not empty)"),
        ({"type": "string", "pattern": "^a$"}, "string (`^a$`)"),
        ({"enum": ["a", 1]}, '`"a"` or `1`'),
        ({"const": -1}, "`-1`"),
        ({"$ref": "#/a"}, "object"),
        ({"type": "array", "maxItems": 4, "items": {"type": "string"}}, "list (at most 4) of string"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number"),
        ({"type": "object", "additionalProperties": True}, "object"),
    ],
)
def test_ranges(schema: dict[str, Any], expected: str) -> None:
    assert range_of(schema) == expected


def test_fields_of_objects_in_objects() -> None:
    inner = {"properties": {"b": {"type": "string", "description": "inside"}, "a": {"const": 1}}, "required": ["a"]}
    other = {"properties": {"b": {"type": "integer", "description": "elsewhere", "default": 2}}}
    schema = {"properties": {"x": {"$ref": "#/I"}, "y": {"items": {"anyOf": [{"$ref": "#/I"}, other]}}}}
    fields = {field.name: field for field in fields_of(schema, {"I": inner})}
    assert list(fields) == ["x", "x.a", "x.b", "y", "y[].b", "y[].a"]
    assert [default_of(fields[name]) for name in ("x.a", "y[].a")] == ["required", ""]
    assert fields["y[].b"].description == "inside; elsewhere"
    assert range_of(fields["y[].b"].schema) == "string or integer"


def test_tests_are_found_by_what_they_send(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("def complete(client):\n    client.post('/new', json={})\n")
    (tmp_path / "test_b.py").write_text(TEST + "def test_one():\n    call(1)\n\n\ndef test_two(s):\n    s.complete()\n")
    marks = "@pytest.mark.parametrize('path', ['/a', '/b'])\n"
    (tmp_path / "test_a.py").write_text(
        TEST + marks + "async def test_three(path):\n    call(2)\n    httpx.get(path)\n"
    )
    tests = read_tests(tmp_path)
    assert find_test(tests, "GET", "/kept/{id}", "") == "test_a.py::test_three"
    assert find_test(tests, "GET", "/kept/{id}", "test_b.py") == "test_b.py::test_one"
    assert find_test(tests, "POST", "/new", "") == "test_b.py::test_two"
    assert find_test(tests, "GET", "/b", "") == "test_a.py::test_three"
    for method, path in (("POST", "/b"), ("GET", "/kept"), ("GET", "/new")):
        with pytest.raises(LookupError, match="no test calls"):
            find_test(tests, method, path, "")
    with pytest.raises(LookupError, match="test_b.py::test_two calls GET /b"):
        find_test([*tests, Called("c", "d", frozenset())], "GET", "/b", "", "test_b.py::test_two")
