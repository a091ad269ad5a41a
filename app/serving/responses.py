"""From a request of ``/v1/responses`` to a chat, and back to its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from app.schemas.chat import ChatRequest
from app.schemas.json import BodyError
from app.schemas.messages import MAX_MESSAGES, Message
from app.schemas.output_format import JsonSchemaFormat, ResponseFormat
from app.schemas.response_tools import chat_tool
from app.schemas.responses import ResponsesRequest
from app.schemas.wire import check_body
from app.serving.chat_payloads import ChatForm
from app.serving.chat_prompt import num_characters
from app.serving.chat_translate import ChatTranslator
from app.serving.errors import InvalidRequest, RequestError
from app.serving.jobs import FindTarget, estimate_tokens
from app.serving.prepared import PreparedCompletion
from app.serving.responses_form import Keep, ResponseForm
from app.serving.responses_store import ResponseNotFound, ResponseStore, StoredResponse
from app.serving.responses_unsupported import RESPONSE_FIELDS, refuse_inner
from app.serving.unsupported import refuse_unsupported

_CHARACTERS_PER_MESSAGE = 16
# fields that mean the same in a chat
_SHARED = (
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "parallel_tool_calls",
    "top_logprobs",
    "priority",
)
# names of a chat's fields, the longer ones first
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "messages": "input",
}


@dataclass(frozen=True, slots=True)
class ResponseJob:
    """A ``Job`` of ``/v1/responses``. previous: the response to go on after. keep: None if it is not to be kept."""

    body: ResponsesRequest
    translator: ChatTranslator
    find_target: FindTarget
    previous: StoredResponse | None
    keep: Keep | None
    has_length_limit: bool

    @property
    def num_sequences(self) -> int:
        return 1

    @property
    def estimated_tokens(self) -> int:
        body = self.body
        before = len(self.previous.conversation) if self.previous is not None else 0
        tools = len(_to_json(body.tools, "tools")) if body.tools else 0
        own = num_characters(body.input) + len(body.instructions or "") + _CHARACTERS_PER_MESSAGE * len(body.input)
        return estimate_tokens(before + tools + own)

    @property
    def is_short(self) -> bool:
        # how long a template takes is up to whoever wrote it
        return False

    def prepare(self, request_id: str) -> PreparedCompletion:
        body = self.body
        self._check()
        target = self.find_target(body.model)
        before = orjson.loads(self.previous.conversation) if self.previous is not None else []
        messages = [*before, *body.input]
        if before and len(messages) > MAX_MESSAGES:
            raise InvalidRequest(
                f"the conversation has {len(messages)} messages with those that come first; {MAX_MESSAGES} are allowed",
                param="previous_response_id",
            )
        said = _to_json(_said(body), "text.format.schema")
        try:
            prepared = self.translator.translate(_chat_request(body, messages), target, request_id)
        except RequestError as error:
            raise _in_own_words(error) from None
        assert isinstance(prepared.form, ChatForm)
        conversation = orjson.dumps(messages) if self.keep is not None else b""
        form = ResponseForm(prepared.form, said, conversation, self.keep)
        return replace(prepared, form=form, last_words=form.last_words)

    def _check(self) -> None:
        refuse_unsupported(self.body.model_extra, RESPONSE_FIELDS)
        refuse_inner(self.body)
        if self.body.truncation == "auto" and self.has_length_limit:
            raise InvalidRequest("'truncation' should be disabled where the length is limited", param="truncation")


def make_job(
    body: ResponsesRequest,
    translator: ChatTranslator,
    find_target: FindTarget,
    store: ResponseStore,
    owner: str | None,
    *,
    has_length_limit: bool,
) -> ResponseJob:
    """The job of a request from ``owner``. Raises InvalidRequest if there is no such previous response."""
    previous = None
    if body.previous_response_id is not None:
        try:
            previous = store.get(owner, body.previous_response_id)
        except ResponseNotFound as error:
            raise InvalidRequest(
                error.message if store.is_open else "this server keeps no responses to go on after",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None
    keep = partial(store.put, owner) if body.store and store.is_open else None
    return ResponseJob(body, translator, find_target, previous, keep, has_length_limit)


def _to_json(value: Any, param: str) -> bytes:
    """JSON of what a client has said. Raises InvalidRequest for what can not be said again."""
    try:
        return orjson.dumps(value)
    except TypeError:
        raise InvalidRequest(
            f"'{param}' should not be nested too deeply nor hold integers beyond 64 bits", param=param
        ) from None


def _chat_request(body: ResponsesRequest, messages: list[Message]) -> ChatRequest:
    if body.instructions is not None:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SHARED if name in body.model_fields_set}
    fields |= {"messages": messages, "logprobs": body.has_logprobs}
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if body.tools:
        fields["tools"] = [chat_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields["tool_choice"] = chat_tool(body.tool_choice)
    response_format = _response_format(body)
    if response_format is not None:
        fields["response_format"] = response_format
    try:
        return check_body(ChatRequest, fields)
    except BodyError as error:
        raise _in_own_words(InvalidRequest(error.message, param=error.param)) from None


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    wanted = body.text.format if body.text is not None else None
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    return ResponseFormat(type=wanted.type, json_schema=JsonSchemaFormat(name=wanted.name or "", schema=wanted.schema_))


def _in_own_words(error: RequestError) -> RequestError:
    """What is said of a chat, said of the request that became one."""
    for old, new in _NAMES.items():
        error.message = error.message.replace(f"'{old}", f"'{new}")
        if error.param is not None and error.param.startswith(old):
            error.param = new + error.param.removeprefix(old)
    return error


def _said(body: ResponsesRequest) -> Mapping[str, Any]:
    """The fields of the request that its answer repeats."""
    wanted = body.text.format if body.text is not None else None
    form = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_unset=True)
    return {
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "text": {"format": form},
        "tools": body.tools,
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls,
        "top_logprobs": body.top_logprobs,
        "truncation": body.truncation,
        "reasoning": {"effort": None, "summary": None},
        "background": False,
        "metadata": body.metadata,
        "user": body.user,
    }
