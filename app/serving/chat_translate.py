"""From a chat request to what the engine is asked: a prompt from the conversation, tools, ends of messages."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.engine.request import GenerationRequest, Grammar, ModelInfo
from app.schemas.chat import ChatRequest
from app.schemas.generation import StreamOptions
from app.schemas.tools import Tool
from app.schemas.wire import INT32_MAX
from app.serving import tool_calls
from app.serving.chat_payloads import ChatForm, ToolReading
from app.serving.chat_prompt import ChatPrompts, num_characters
from app.serving.chat_template import ChatTemplate
from app.serving.chat_unsupported import CHAT_FIELDS
from app.serving.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter, quote
from app.serving.jobs import FindTarget, estimate_tokens
from app.serving.logprobs import token_names
from app.serving.payloads import AnswerHead
from app.serving.prepared import PreparedCompletion, PreparedPrompt
from app.serving.preparing import Preparation, Target
from app.serving.tokenizer import Tokenizer
from app.serving.unsupported import refuse_unsupported

_CHARACTERS_PER_MESSAGE = 16
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A ``Job`` of ``/v1/chat/completions``."""

    body: ChatRequest
    translator: ChatTranslator
    find_target: FindTarget

    @property
    def num_sequences(self) -> int:
        return self.body.n

    @property
    def estimated_tokens(self) -> int:
        messages = self.body.messages
        num = num_characters(messages, self.body.offered_tools)
        return estimate_tokens(num + _CHARACTERS_PER_MESSAGE * len(messages))

    @property
    def is_short(self) -> bool:
        # how long a template takes is up to whoever wrote it
        return False

    def prepare(self, request_id: str) -> PreparedCompletion:
        return self.translator.translate(self.body, self.find_target(self.body.model), request_id)


class ChatTranslator:
    """Turns bodies of ``/v1/chat/completions`` into what is run.

    template: None for a model that has none. allows_kwargs: whether clients may set variables of the template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        preparation: Preparation,
        template: ChatTemplate | None,
        *,
        allows_kwargs: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._preparation = preparation
        self._allows_kwargs = allows_kwargs
        self.prompts = ChatPrompts(tokenizer, template)
        self._ends = _Ends.of(template, self.prompts)
        # a mark that is a control token would be left out of the text
        self._is_mark_special = any(
            self.prompts.control_tokens.id_of(mark) is not None for mark in (tool_calls.OPEN, tool_calls.CLOSE)
        )

    def translate(self, body: ChatRequest, target: Target, request_id: str) -> PreparedCompletion:
        """Blocks in proportion to the conversation. Raises InvalidRequest and its kin."""
        started = time.monotonic()
        info = target.info
        self._check(body, info)
        ends = _Ends() if body.ignore_eos else self._ends
        tools = self._tool_reading(body)
        prompt = PreparedPrompt(self._request(body, info, request_id, ends))
        options = body.stream_options or StreamOptions()
        has_continuous_usage = options.include_usage and options.continuous_usage_stats
        form = ChatForm(
            AnswerHead(f"chatcmpl-{request_id}", int(time.time()), target.model, target.fingerprint),
            self._tokenizer,
            token_names(self._tokenizer, as_ids=body.return_tokens_as_token_ids),
            num_choices=body.n,
            has_logprobs=body.logprobs,
            has_usage_chunk=options.include_usage,
            has_continuous_usage=has_continuous_usage,
            has_token_ids=body.return_token_ids,
            tools=tools,
            own_stops=frozenset(ends.texts) - frozenset(body.stop),
        )
        return PreparedCompletion(
            form=form,
            started=started,
            prompts=(prompt,),
            n=body.n,
            logprobs=body.top_logprobs if body.logprobs else None,
            stops=tuple(dict.fromkeys((*body.stop, *ends.texts))),
            end_of_text_ids=frozenset((*info.eos_token_ids, *ends.ids)) - frozenset(body.stop_token_ids),
            is_stop_included=body.include_stop_str_in_output,
            is_special_skipped=body.skip_special_tokens and not (tools is not None and self._is_mark_special),
            is_stream=body.stream,
            has_continuous_usage=has_continuous_usage,
            prompt_logprobs=body.prompt_logprobs,
            has_token_ids=body.return_token_ids,
            names_ids=body.return_tokens_as_token_ids,
            min_tokens=body.min_tokens,
            max_waiting_bytes=self._preparation.limits.max_waiting_bytes if body.stream else None,
        )

    def _check(self, body: ChatRequest, info: ModelInfo) -> None:
        refuse_unsupported(body.model_extra, CHAT_FIELDS)
        if body.chat_template_kwargs and not self._allows_kwargs:
            raise UnsupportedParameter("chat_template_kwargs")
        # said before anything that costs
        _ = self.prompts.template
        self._preparation.check(body, info)

    def _tool_reading(self, body: ChatRequest) -> ToolReading | None:
        if not body.offered_tools:
            return None
        return ToolReading(is_forced=_is_forced(body), is_single=not body.parallel_tool_calls)

    def _request(self, body: ChatRequest, info: ModelInfo, request_id: str, ends: _Ends) -> GenerationRequest:
        max_tokens, name = _max_tokens(body)
        ids: Sequence[int] = self.prompts.render(
            body.messages,
            tools=body.offered_tools,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens,
            variables=body.chat_template_kwargs,
            ending=f"{tool_calls.OPEN}\n" if _is_forced(body) else "",
        )
        if not ids:
            raise InvalidRequest("the chat template makes an empty prompt of 'messages'", param="messages")
        preparation = self._preparation
        ids = preparation.truncate(body, ids, 1 if max_tokens is None else max_tokens)
        if max_tokens is None:
            max_tokens = preparation.default_max_tokens(INT32_MAX, len(ids))
        try:
            preparation.check_length(len(ids), max_tokens, name)
        except ContextLengthExceeded as error:
            # the conversation is what is too long here
            error.param = "messages" if error.param == "prompt" else error.param
            raise
        preparation.check_prompt_logprobs(body.prompt_logprobs, len(ids), body.n, "prompt_logprobs")
        request = preparation.engine_request(
            body,
            info,
            preparation.unique_id(request_id),
            ids,
            max_tokens=max_tokens,
            logprobs=body.top_logprobs if body.logprobs else None,
            grammar=_call_grammar(body),
        )
        if not ends.ids:
            return request
        return replace(request, stop_token_ids=tuple(dict.fromkeys((*request.stop_token_ids, *ends.ids))))


@dataclass(frozen=True, slots=True)
class _Ends:
    """What ends a message of the assistant beside end-of-text: control tokens, and texts that are none."""

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, template: ChatTemplate | None, prompts: ChatPrompts) -> _Ends:
        ids, texts = [], []
        for text in template.ends if template is not None else ():
            index = prompts.control_tokens.id_of(text)
            if index is None:
                texts.append(text)
            else:
                ids.append(index)
        return cls(tuple(ids), tuple(texts))


def _max_tokens(body: ChatRequest) -> tuple[int | None, str]:
    if body.max_completion_tokens is not None:
        return body.max_completion_tokens, "max_completion_tokens"
    return body.max_tokens, "max_tokens" if body.max_tokens is not None else "max_completion_tokens"


def _is_forced(body: ChatRequest) -> bool:
    return bool(body.tools) and body.tool_choice not in (None, "none", "auto")


def _call_grammar(body: ChatRequest) -> Grammar | None:
    """One call of the functions that may be chosen, for answers that have to be a call."""
    if not _is_forced(body):
        return None
    if body.demands:
        raise InvalidRequest(
            f"'{body.demands[0]}' is not allowed when 'tool_choice' forces a call", param="tool_choice"
        )
    named = body.named_tool
    schemas = [_call_schema(tool) for tool in body.tools if named in (None, tool["function"]["name"])]
    schema: dict[str, Any] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    for key in _DEFINITIONS:
        found = [parts for tool in body.tools if (parts := _parameters(tool).get(key))]
        if found:
            # references are told from the outermost schema
            schema[key] = _joined(found)
    return Grammar("json_schema", json.dumps(schema))


def _joined(definitions: Sequence[Any]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for parts in definitions:
        for name, part in parts.items() if isinstance(parts, dict) else ():
            if joined.setdefault(name, part) != part:
                raise InvalidRequest(
                    f"'tools' define '{quote(name)[1:-1]}' in two ways, and one of them has to be called", param="tools"
                )
    return joined


def _parameters(tool: Tool) -> dict[str, Any]:
    parameters: dict[str, Any] = tool["function"].get("parameters") or {"type": "object"}
    return parameters


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool["function"]["name"]},
            "arguments": {key: value for key, value in _parameters(tool).items() if key not in _DEFINITIONS},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
