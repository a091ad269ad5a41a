"""Fields of chat requests that other servers know and this one does not: refused, unless they would change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.serving.unsupported import COMPLETION_FIELDS

_NONE: tuple[Any, ...] = ()
_EMPTY: tuple[Any, ...] = ([], {}, "")

# name -> values without effect; `metadata`, `safety_identifier` and hints for caches never have any
CHAT_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **COMPLETION_FIELDS,
    "prompt": _NONE,
    "echo": (False,),
    "suffix": _EMPTY,
    "best_of": (1,),
    "functions": _EMPTY,
    "function_call": ("none",),
    "documents": _EMPTY,
    "reasoning_effort": ("none",),
    "reasoning": _NONE,
    "include_reasoning": (False, True),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "audio": _NONE,
    "prediction": _NONE,
    "verbosity": ("medium",),
    "web_search_options": _NONE,
    "mm_processor_kwargs": _EMPTY,
    "media_io_kwargs": _EMPTY,
}
