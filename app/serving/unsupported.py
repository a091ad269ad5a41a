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
    "return_hidden_states": _OFF,
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "no_stop_trim": _OFF,
    "json_schema": _NONE,
    "regex": _NONE,
    "ebnf": _NONE,
    "grammar": _NONE,
    "logits_processors": _EMPTY,
    "use_beam_search": _OFF,
    "length_penalty": (1, 1.0),
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
    "top_a": (0, 0.0),
    "top_n_sigma": (-1, -1.0),
    "dynatemp_range": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "dry_multiplier": (0, 0.0),
    # 'repetition_penalty' and 'max_tokens' under the names of llama.cpp and others
    "repeat_penalty": (1, 1.0),
    "n_predict": _NONE,
    "max_new_tokens": _NONE,
    "n_probs": (0,),
    # of chat completions
    "max_completion_tokens": _NONE,
    "top_logprobs": (0,),
    "image_data": _EMPTY,
    "structural_tag": _NONE,
    "guided_whitespace_pattern": _NONE,
    "truncation_side": ("left",),
    "repetition_detection": _NONE,
    "thinking_token_budget": _NONE,
    "custom_logit_processor": _NONE,
    "vllm_xargs": _EMPTY,
}


def refuse_unsupported(
    extra: Mapping[str, Any] | None, fields: Mapping[str, tuple[Any, ...]] = COMPLETION_FIELDS
) -> None:
    """Raise UnsupportedParameter for the first field of ``extra`` that is known and would have an effect.

    extra: what the schema does not name. fields: known ones, with values without effect.
    """
    for name, value in (extra or {}).items():
        if name not in fields:
            continue
        # true equals 1 in Python, and no client means it that way
        if not any(type(value) is type(known) and value == known for known in fields[name]):
            raise UnsupportedParameter(name)
