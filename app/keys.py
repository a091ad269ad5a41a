"""API keys as an operator writes them: a key, perhaps its name, perhaps limits of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_NAMELESS = re.compile(r"key-\d+")
_OPTION = re.compile(r"([a-z-]+)=(\d{1,12})")


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What may be asked for under one name; 0 for no limit.

    max_concurrency: requests open at once. requests_per_minute, tokens_per_minute: in any 60 seconds; tokens of prompts
    and answers count when a request is over.
    """

    max_concurrency: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and whom it belongs to. Several keys of one name share its limits, so that a key can be exchanged."""

    secret: str = field(repr=False)
    name: str
    limits: KeyLimits = KeyLimits()


def parse_keys(lines: Iterable[str], default: KeyLimits, first_number: int = 1) -> list[ApiKey]:
    """The keys of a file, one a line: ``KEY``, ``NAME = KEY``, either with ``max-concurrency=N`` and such behind it.

    Empty lines and those that begin with ``#`` say nothing. A key without a name is called ``key-N`` by its number.
    Raises ValueError, whose message repeats nothing of a line.
    """
    keys: list[ApiKey] = []
    for place, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            keys.append(parse_key(line, default, f"key-{first_number + len(keys)}"))
        except ValueError as error:
            raise ValueError(f"line {place}: {error}") from None
    return keys


def parse_key(text: str, default: KeyLimits = KeyLimits(), nameless: str = "key-1") -> ApiKey:
    """One key. Raises ValueError, whose message repeats nothing of the text."""
    words = text.split()
    name = nameless
    if len(words) > 1 and words[1] == "=":
        name = words[0]
        if _NAME.fullmatch(name) is None or _NAMELESS.fullmatch(name):
            raise ValueError("a name holds up to 64 letters, digits and any of . _ @ - and is not key-N")
        words = words[2:]
    if not words:
        raise ValueError("an empty key would let everybody in; leave the setting out to serve without keys")
    secret, *options = words
    if not secret.isascii() or not secret.isprintable():
        raise ValueError("a key holds only printable ASCII characters and no spaces")
    return ApiKey(secret, name, _with_options(default, options))


def join_keys(keys: Sequence[ApiKey]) -> tuple[ApiKey, ...]:
    """Each key once. Raises ValueError when a key has two names, or a name has two sets of limits."""
    by_secret: dict[str, ApiKey] = {}
    limits: dict[str, KeyLimits] = {}
    for key in keys:
        known = by_secret.setdefault(key.secret, key)
        is_nameless = _NAMELESS.fullmatch(key.name) and _NAMELESS.fullmatch(known.name)
        if known.name != key.name and not is_nameless:
            raise ValueError(f"{key.name!r} and {known.name!r} have the same key")
        if limits.setdefault(known.name, known.limits) != key.limits:
            raise ValueError(f"the keys of {known.name!r} have different limits")
    return tuple(by_secret.values())


def _with_options(default: KeyLimits, options: Sequence[str]) -> KeyLimits:
    known = [name.replace("_", "-") for name in KeyLimits.__dataclass_fields__]
    values: dict[str, int] = {}
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None or match[1] not in known or match[1].replace("-", "_") in values:
            raise ValueError(
                f"a key has no spaces; behind it each of {', '.join(f'{name}=N' for name in known)} may stand once"
            )
        values[match[1].replace("-", "_")] = int(match[2])
    return replace(default, **values)
