"""Fields that other servers know and this one does not: refused by name, unless they would change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.serving.errors import UnsupportedParameter

_OFF: tuple[Any, ...] = (False,)
_NONE: tuple[Any, ...] = ()
_EMPTY: tuple[Any, ...] = ([], {}, "")

# name -> values without effect; null is one always, and never gets here
COMPLETION_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "prompt_logprobs": _NONE,
    "min_tokens": (0,),
    "allowed_token_ids": _NONE,
    "bad_words": _EMPTY,
    "truncate_prompt_tokens": _NONE,
    "return_token_ids": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "return_hidden_states": _OFF,
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "no_stop_trim": _OFF,
    "response_format": ({"type": "text"},),
    "structured_outputs": _EMPTY,
    "guided_json": _NONE,
    "guided_regex": _NONE,
    "guided_choice": _NONE,
    "guided_grammar": _NONE,
    "json_schema": _NONE,
    "regex": _NONE,
    "ebnf": _NONE,
    "grammar": _NONE,
    "logits_processors": _EMPTY,
    "use_beam_search": _OFF,
    "length_penalty": (1, 1.0),
    "priority": (0,),
    "cache_salt": _NONE,
    "session_id": _NONE,
    "session_params": _NONE,
    "kv_transfer_params": _NONE,
    "lora_path": _NONE,
    "prompt_embeds": _NONE,
    "messages": _NONE,
    "chat_template": _NONE,
    "chat_template_kwargs": _EMPTY,
    "tools": _EMPTY,
    "tool_choice": ("none", "auto"),
    "functions": _EMPTY,
    "function_call": ("none", "auto"),
    "min_new_tokens": (0,),
    "stop_regex": _EMPTY,
    "typical_p": (1, 1.0),
    "mirostat": (0,),
}


def refuse_unsupported(extra: Mapping[str, Any] | None, num_choices: int) -> None:
    """Raise UnsupportedParameter for the first field of ``extra`` that is known and would have an effect.

    extra: what the schema does not name. num_choices: ``n``, of which ``best_of`` must not differ.
    """
    for name, value in (extra or {}).items():
        if name == "best_of":
            without_effect: tuple[Any, ...] = (num_choices,)
        elif name in COMPLETION_FIELDS:
            without_effect = COMPLETION_FIELDS[name]
        else:
            continue
        # true equals 1 in Python, and no client means it that way
        if not any(type(value) is type(known) and value == known for known in without_effect):
            raise UnsupportedParameter(name)
