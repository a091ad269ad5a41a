"""Decides from a distribution's metadata, and from a file's first lines, whether its licence is permissive.

Permissive means the MIT, BSD, Apache-2.0, PSF, ISC, Zlib, Boost, Unlicense and CC0 families. Whatever is unknown,
ambiguous, copyleft or proprietary is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

PERMISSIVE_IDS = frozenset(
    {
        "mit", "mit-0", "mit-cmu", "hpnd", "x11",
        "bsd", "0bsd", "bsd-1-clause", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-open-mpi",
        "apache-2.0",
        "psf", "psf-2.0", "python-2.0", "python-2.0.1", "cnri-python",
        "isc", "zlib", "zlib-acknowledgement", "bsl-1.0", "unlicense", "cc0-1.0",
    }
)  # fmt: skip

# what people write into the free-text field, once lower-cased and stripped of "the", "license" and commas
_ALIASES = {
    "mit": "MIT",
    "expat": "MIT",
    "bsd": "BSD",
    "new bsd": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "simplified bsd": "BSD-2-Clause",
    "3-clause bsd": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd 3 clause": "BSD-3-Clause",
    "bsd 3": "BSD-3-Clause",
    "bsd-3": "BSD-3-Clause",
    "2-clause bsd": "BSD-2-Clause",
    "bsd 2-clause": "BSD-2-Clause",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "apache v2": "Apache-2.0",
    "apache version 2.0": "Apache-2.0",
    "apache software": "Apache-2.0",
    "apache software 2.0": "Apache-2.0",
    "isc": "ISC",
    "psf": "PSF-2.0",
    "psfl": "PSF-2.0",
    "python software foundation": "PSF-2.0",
    "zlib": "Zlib",
    "unlicense": "Unlicense",
    "cc0": "CC0-1.0",
}

_CLASSIFIERS = {
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "Python License (CNRI Python License)": "CNRI-Python",
    "ISC License (ISCL)": "ISC",
    "zlib/libpng License": "Zlib",
    "Boost Software License 1.0 (BSL-1.0)": "BSL-1.0",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "The Unlicense (Unlicense)": "Unlicense",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
}

_FORBIDDEN_WORDS = re.compile(
    r"\b(A?GPL|LGPL|GNU (?:Lesser |Affero |Library )?General Public|Mozilla Public|MPL|EPL|Eclipse Public|EUPL|CDDL|"
    r"proprietary|non-?commercial|CC[ -]BY[ -](?:NC|ND|SA)|LicenseRef-NVIDIA|NVIDIA Software License)",
    re.IGNORECASE,
)

_FULL_TEXTS = (
    ("Permission is hereby granted, free of charge", "MIT"),
    ("Redistribution and use in source and binary forms", "BSD"),
    ("Apache License", "Apache-2.0"),
)

# phrases of a file's own notice that overrule its distribution's metadata
_FORBIDDEN_NOTICES = re.compile(
    r"GNU (?:Lesser |Affero |Library )?General Public|Mozilla Public License|LicenseRef-|strictly prohibited|"
    r"non-?commercial (?:use|purposes)|Creative Commons|Eclipse Public",
    re.IGNORECASE,
)
_SPDX_LINE = re.compile(r"SPDX-License-Identifier:\s*([^\n*#]+)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a licence is permissive, what it is called, and why it was refused ("" if it was not)."""

    is_permissive: bool
    licence: str
    reason: str = ""


def judge_expression(expression: str) -> bool:
    """Whether an SPDX expression can be met by permissive licences alone: AND needs all, OR needs one."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression)
    if not tokens:
        return False
    stream = _Tokens(tokens)
    try:
        return _parse_or(stream) and stream.is_exhausted
    except IndexError:
        return False


class _Tokens:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    @property
    def is_exhausted(self) -> bool:
        return self._next == len(self._tokens)

    def take(self) -> str:
        token = self._tokens[self._next]
        self._next += 1
        return token

    def accept(self, word: str) -> bool:
        if self.is_exhausted or self._tokens[self._next].upper() != word:
            return False
        self._next += 1
        return True


def _parse_or(stream: _Tokens) -> bool:
    result = _parse_and(stream)
    while stream.accept("OR"):
        other = _parse_and(stream)
        result = result or other
    return result


def _parse_and(stream: _Tokens) -> bool:
    result = _parse_atom(stream)
    while stream.accept("AND"):
        other = _parse_atom(stream)
        result = result and other
    return result


def _parse_atom(stream: _Tokens) -> bool:
    if stream.accept("("):
        result = _parse_or(stream)
        return stream.take() == ")" and result
    name = stream.take()
    if stream.accept("WITH"):
        stream.take()
    return name.lower() in PERMISSIVE_IDS


def judge_distribution(metadata: Message) -> Verdict:
    """The verdict over a distribution: its licence expression, else its classifiers, else its free-text field."""
    expression = (metadata.get("License-Expression") or "").strip()
    if expression:
        is_permissive = judge_expression(expression)
        return Verdict(is_permissive, expression, "" if is_permissive else f"not permissive: {expression}")
    field = (metadata.get("License") or "").strip()
    classifiers = list(_licence_classifiers(metadata))
    if classifiers:
        return _judge_classifiers(classifiers, field)
    return _judge_field(field)


def _licence_classifiers(metadata: Message) -> Iterator[str]:
    for classifier in metadata.get_all("Classifier") or []:
        parts = [part.strip() for part in str(classifier).split("::")]
        if parts[0] == "License" and parts[-1] not in ("License", "OSI Approved"):
            yield parts[-1]


def _judge_classifiers(classifiers: list[str], field: str) -> Verdict:
    refused = [name for name in classifiers if name not in _CLASSIFIERS]
    if refused:
        return Verdict(False, " / ".join(classifiers), f"not permissive: {', '.join(refused)}")
    # long fields are whole licence texts and may list the licences of bundled binaries
    if len(field) <= 100 and _FORBIDDEN_WORDS.search(field):
        return Verdict(False, field, f"not permissive: {field}")
    return Verdict(True, " / ".join(sorted({_CLASSIFIERS[name] for name in classifiers})))


def _judge_field(field: str) -> Verdict:
    if not field or field.upper() == "UNKNOWN":
        return Verdict(False, "unknown", "no licence in the metadata")
    if _FORBIDDEN_WORDS.search(field):
        return Verdict(False, _first_line(field), f"not permissive: {_first_line(field)}")
    if len(field) <= 100:
        licence = _ALIASES.get(_simplified(field), field)
        if judge_expression(licence):
            return Verdict(True, licence)
        return Verdict(False, field, f"not recognised: {field}")
    for phrase, licence in _FULL_TEXTS:
        if phrase in field:
            return Verdict(True, licence)
    return Verdict(False, _first_line(field), f"not recognised: {_first_line(field)}")


def _simplified(field: str) -> str:
    words = re.sub(r"[(),\"']", " ", field.lower()).split()
    return " ".join(word for word in words if word not in ("the", "license", "licence", "licensed"))


def _first_line(text: str) -> str:
    return text.splitlines()[0][:80]


def has_forbidden_notice(head: str) -> bool:
    """Whether a file's first lines carry a licence of their own that is not permissive."""
    if _FORBIDDEN_NOTICES.search(head):
        return True
    return any(not judge_expression(found.strip()) for found in _SPDX_LINE.findall(head))
