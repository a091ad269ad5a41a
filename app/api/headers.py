"""Headers of a request, read as they stand: an object that knows them all costs more than a look at each."""

from __future__ import annotations

from starlette.types import Scope


def header_values(scope: Scope, name: bytes) -> list[str]:
    """All values of a header, whose name is given in lower case."""
    return [str(value, "latin-1") for key, value in scope["headers"] if key == name]


def find_header(scope: Scope, name: bytes) -> str | None:
    """The first value of a header, whose name is given in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None
