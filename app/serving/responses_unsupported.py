"""Fields of responses that other servers know and this one does not: refused, unless they would change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.schemas.responses import ResponsesRequest
from app.serving.unsupported import refuse_unsupported

_OFF: tuple[Any, ...] = (False,)
_NONE: tuple[Any, ...] = ()
_EMPTY: tuple[Any, ...] = ([], {}, "")

# name -> values without effect; `safety_identifier` and hints for caches never have any
RESPONSE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "background": _OFF,
    "conversation": _NONE,
    "prompt": _NONE,
    "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
    "service_tier": ("auto", "default"),
    "max_tool_calls": _NONE,
    "stream_options": ({}, {"include_obfuscation": False}),
    "context_management": _EMPTY,
    "moderation": _NONE,
    # of chats and completions
    "messages": _NONE,
    "max_tokens": _NONE,
    "max_completion_tokens": _NONE,
    "response_format": ({"type": "text"},),
    "structured_outputs": _NONE,
    "guided_json": _NONE,
    "guided_regex": _NONE,
    "guided_choice": _NONE,
    "guided_grammar": _NONE,
    "n": (1,),
    "best_of": (1,),
    "logprobs": _OFF,
    "prompt_logprobs": _NONE,
    "stop": _EMPTY,
    "stop_token_ids": _EMPTY,
    "include_stop_str_in_output": _OFF,
    "ignore_eos": _OFF,
    "skip_special_tokens": (True,),
    "logit_bias": _EMPTY,
    "min_tokens": (0,),
    "allowed_token_ids": _NONE,
    "bad_words": _EMPTY,
    "return_token_ids": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "truncate_prompt_tokens": _NONE,
    "chat_template": _NONE,
    "chat_template_kwargs": _EMPTY,
}
_TEXT_FIELDS: Mapping[str, tuple[Any, ...]] = {"text.verbosity": ("medium",)}


def refuse_inner(body: ResponsesRequest) -> None:
    """The same for what stands inside of `text`. Raises UnsupportedParameter."""
    extra = body.text.model_extra if body.text is not None else None
    refuse_unsupported({f"text.{name}": value for name, value in (extra or {}).items()}, _TEXT_FIELDS)
