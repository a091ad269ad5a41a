"""Grammars of requests, checked before the engine hears of them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from app.engine.grammars import GrammarError, check
from app.engine.request import Grammar
from app.serving.errors import InvalidRequest

# grammars whose check is remembered, by a hash of a few bytes
MAX_REMEMBERED = 1024


class GrammarChecker:
    """Tells whether an output can be held to a grammar. Safe to use from several threads, and best from one that is not
    the event loop's: the first check imports a library, and a hostile grammar takes up to half a second.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # what is wrong with each, None where nothing is
        self._complaints: OrderedDict[bytes, str | None] = OrderedDict()

    def check(self, grammar: Grammar, param: str | None = None) -> None:
        """Raise InvalidRequest, for the field ``param``, unless the grammar can be used."""
        key = hashlib.sha256(f"{grammar.kind}:{grammar.source}".encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            is_known = key in self._complaints
            if is_known:
                self._complaints.move_to_end(key)
                complaint = self._complaints[key]
        if not is_known:
            complaint = _complaint_of(grammar)
            with self._lock:
                self._complaints[key] = complaint
                if len(self._complaints) > MAX_REMEMBERED:
                    self._complaints.popitem(last=False)
        if complaint is not None:
            raise InvalidRequest(complaint, param=param)


def _complaint_of(grammar: Grammar) -> str | None:
    try:
        check(grammar)
    except GrammarError as error:
        return str(error)
    return None
