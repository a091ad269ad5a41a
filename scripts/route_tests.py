"""Finds for every route a test that calls it, by reading the tests: which of them sends what to where."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "api"
_METHODS = frozenset({"get", "post", "delete"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Called:
    """One test, and what it calls: method and path, with `{}` for what is filled in."""

    file: str
    name: str
    calls: frozenset[tuple[str, str]]


def find_test(tests: Iterable[Called], method: str, path: str, home: str, chosen: str | None = None) -> str:
    """``file::name`` of a test that calls the route: the chosen one, or the first in the file ``home``, or the first.

    Raises LookupError where there is none, and where the chosen one does not call it.
    """
    pattern = re.compile(re.sub(r"\\{[^/]*\\}", "(?=.).*", re.escape(path)))
    callers = [
        f"{test.file}::{test.name}"
        for test in sorted(tests, key=lambda test: (test.file != home, test.file))
        if any(verb == method and pattern.fullmatch(place) for verb, place in test.calls)
    ]
    if not callers or (chosen and chosen not in callers):
        raise LookupError(f"{chosen or 'no test'} calls {method} {path}")
    return chosen or callers[0]


def read_tests(folder: Path = TESTS) -> list[Called]:
    """All tests of a folder, file by file as they stand there, with what their helpers call."""
    shared = _calls_by_name(ast.parse((folder / "conftest.py").read_text(encoding="utf-8")))
    tests = []
    for path in sorted(folder.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        helpers = shared | _calls_by_name(tree)
        for function in tree.body:
            if isinstance(function, _Function) and function.name.startswith("test_"):
                calls = helpers[function.name] | _calls_of_helpers(function, helpers)
                tests.append(Called(path.name, function.name, frozenset(calls)))
    return tests


def _calls_by_name(tree: ast.AST) -> dict[str, frozenset[tuple[str, str]]]:
    return {node.name: frozenset(_calls(node)) for node in ast.walk(tree) if isinstance(node, _Function)}


def _calls_of_helpers(
    function: _Function, helpers: Mapping[str, frozenset[tuple[str, str]]]
) -> frozenset[tuple[str, str]]:
    names = {_last_name(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    return frozenset().union(*(calls for name, calls in helpers.items() if name in names))


def _calls(function: _Function) -> Iterator[tuple[str, str]]:
    """What a function sends by itself; a path that is a parameter is each of the paths that the decorators tell."""
    told = [path for decorator in function.decorator_list for node in ast.walk(decorator) for path in _paths(node)]
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and node.args and (method := _last_name(node.func)) in _METHODS:
            target = node.args[0]
            for path in told if isinstance(target, ast.Name) else _paths(target):
                yield method.upper(), path


def _paths(node: ast.AST) -> Iterator[str]:
    text = ""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if text.startswith("/"):
        yield text


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
