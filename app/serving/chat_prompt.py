"""From a conversation to the token ids of its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.schemas.messages import Message
from app.serving.chat_template import ChatTemplate
from app.serving.chat_tokens import ControlTokens
from app.serving.errors import InvalidRequest
from app.serving.tokenizer import Tokenizer

# what the prompt knows by itself; a client's variables may not stand in for it
RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"))
# a noncharacter of Unicode that marks where the last message ends
_END = "\ufdd2"

NO_TEMPLATE = (
    "this model has no chat template: the operator can name one with --chat-template (a file, or 'chatml'); "
    "'/v1/completions' works without"
)


class ChatPrompts:
    """Prompts of one model, whose template may be missing: then every conversation is refused.

    Blocks in proportion to the conversation, for about a second at most in a template; any thread may call.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._template = template
        self.control_tokens = ControlTokens(tokenizer)

    @property
    def template(self) -> ChatTemplate:
        """Raises InvalidRequest where there is none."""
        if self._template is None:
            raise InvalidRequest(NO_TEMPLATE, param="messages")
        return self._template

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        variables: Mapping[str, Any] | None = None,
        ending: str = "",
    ) -> list[int]:
        """Token ids of the prompt. ``messages`` and ``tools`` as ``app.schemas`` checks them.

        variables: more of them for the template. ending: text behind the prompt. Raises InvalidRequest.
        """
        template = self.template
        if tools and not template.has_tools:
            raise InvalidRequest("the chat template of this model has no place for tools", param="tools")
        for name in RESERVED & (variables or {}).keys():
            raise InvalidRequest(f"'chat_template_kwargs' may not hold '{name}'", param="chat_template_kwargs")
        shield = self.control_tokens.shield
        shown = shield([_shown(message, template.has_developer) for message in messages])
        if continue_final_message:
            _open_end(shown[-1])
        given = {
            **shield(dict(variables or {})),
            "tools": shield(list(tools)) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = template.render(shown, given, num_characters(messages, tools, variables))
        if continue_final_message:
            text = _cut_end(text)
        return self.control_tokens.encode(text + ending, add_special_tokens=add_special_tokens)


def num_characters(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), variables: Mapping[str, Any] | None = None
) -> int:
    """About how much a conversation is, without the template's own words."""
    num = sum(len(message["content"] or "") + len(message.get("reasoning_content", "")) for message in messages)
    for message in messages:
        if "tool_calls" in message:
            num += sum(len(call["function"]["arguments"]) for call in message["tool_calls"])
    return num + (len(json.dumps(tools)) if tools else 0) + (len(json.dumps(variables)) if variables else 0)


def _shown(message: Message, has_developer: bool) -> Message:
    """The message as templates expect it: arguments of calls as objects, roles that they know."""
    shown = dict(message)
    if shown["role"] == "developer" and not has_developer:
        shown["role"] = "system"
    if "tool_calls" in shown:
        shown["tool_calls"] = [_shown_call(call) for call in shown["tool_calls"]]
    return shown


def _shown_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _open_end(message: Message) -> None:
    if not message["content"]:
        raise InvalidRequest("'continue_final_message' needs a last message with content", param="messages")
    message["content"] += _END


def _cut_end(text: str) -> str:
    end = text.rfind(_END)
    if end < 0:
        raise InvalidRequest(
            "the chat template does not show the last message, which can not be continued",
            param="continue_final_message",
        )
    return text[:end]
