"""`POST /v1/responses`: the request, field by field, and the shape of its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from app.schemas.json import BodyError
from app.schemas.messages import Message
from app.schemas.output_format import MAX_FORMAT_NAME_CHARACTERS
from app.schemas.response_items import INPUT_SCHEMA, check_input
from app.schemas.response_tools import (
    RESPONSE_TOOL_CHOICE_SCHEMA,
    RESPONSE_TOOLS_SCHEMA,
    check_response_tool_choice,
    check_response_tools,
)
from app.schemas.sampling import SamplingFields
from app.schemas.tools import Tool
from app.schemas.wire import INT32_MAX, WireModel, refuse

MAX_METADATA = 16
MAX_METADATA_KEY_CHARACTERS = 64
MAX_METADATA_CHARACTERS = 512
MAX_RESPONSE_ID_CHARACTERS = 128

LOGPROBS = "message.output_text.logprobs"
# there is no reasoning whose content could be encrypted
_INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")


def _check_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise refuse("metadata_type", f"should be an object of at most {MAX_METADATA} keys")
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY_CHARACTERS:
            raise refuse("metadata_key", f"should have keys of at most {MAX_METADATA_KEY_CHARACTERS} characters")
        if not isinstance(text, str) or len(text) > MAX_METADATA_CHARACTERS:
            raise refuse("metadata_value", f"should hold strings of at most {MAX_METADATA_CHARACTERS} characters")
    return value


def _check_include(value: Any) -> list[str]:
    if not isinstance(value, list) or any(name not in _INCLUDABLE for name in value):
        raise refuse("include", f"should be a list; it may hold '{LOGPROBS}', and nothing else is supported")
    return value


_METADATA_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_METADATA,
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_CHARACTERS},
}
_INCLUDE_SCHEMA = {"type": "array", "items": {"enum": list(_INCLUDABLE)}}


class TextFormat(WireModel):
    """The form of the whole text."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text`: any; `json_object`: a JSON object; `json_schema`: JSON that `schema` describes"
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_FORMAT_NAME_CHARACTERS,
        description="of the schema, for which it is required; not shown to the model",
    )
    schema_: dict[str, Any] | None = Field(
        default=None, alias="schema", description="the JSON schema; required for `json_schema`, and only there"
    )
    description: str | None = Field(default=None, description="what the schema is for; not shown to the model")
    strict: bool = Field(
        default=False, description="told in the answer; the text is held to the schema whatever it says"
    )

    @model_validator(mode="after")
    def _check_together(self) -> TextFormat:
        is_schema = self.type == "json_schema"
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if is_schema and value is None:
                raise BodyError(f"'text.format.{name}' is required for the type 'json_schema'", f"text.format.{name}")
        if not is_schema and self.schema_ is not None:
            raise BodyError("'text.format.schema' needs the type 'json_schema'", "text.format.schema")
        return self


class TextOptions(WireModel):
    """What the text of an answer looks like."""

    format: TextFormat | None = Field(default=None, description="the form of the whole text; any when left out")


class ResponsesRequest(SamplingFields):
    """A request to go on with a conversation. Null is the same as leaving a field out; unknown fields are ignored."""

    input: Annotated[list[Message], PlainValidator(check_input), WithJsonSchema(INPUT_SCHEMA)] = Field(
        description="what is new in the conversation: the user's words, or items, oldest first; "
        "control tokens in it are plain text"
    )
    instructions: str | None = Field(
        default=None, description="a system message before everything else; not carried over to later responses"
    )
    previous_response_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_RESPONSE_ID_CHARACTERS,
        description="go on after this stored response: its input and output, and all before it, come first. "
        "They are read by the model once more and count as input tokens",
    )
    store: bool = Field(
        default=True,
        description="keep the response in memory for later requests, until others take its place; the answer tells "
        "whether it is kept at all",
    )
    max_output_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT32_MAX,
        description="most tokens to generate; left out, until the model stops or a limit is reached",
    )
    text: TextOptions | None = Field(default=None, description="what the text looks like; any text when left out")
    tools: Annotated[list[Tool], PlainValidator(check_response_tools), WithJsonSchema(RESPONSE_TOOLS_SCHEMA)] = Field(
        default=[], description="functions that the model may call, where its chat template has a place for them"
    )
    tool_choice: Annotated[
        str | Tool | None, PlainValidator(check_response_tool_choice), WithJsonSchema(RESPONSE_TOOL_CHOICE_SCHEMA)
    ] = Field(
        default=None,
        description="whether a tool is called: `none`, `auto` (the model decides, default), `required`, "
        "or one function by name",
    )
    parallel_tool_calls: bool = Field(default=True, description="false: at most one call is answered")
    include: Annotated[list[str], PlainValidator(_check_include), WithJsonSchema(_INCLUDE_SCHEMA)] = Field(
        default=[],
        description=f"what to tell beside the text: `{LOGPROBS}`, which is not for requests with tools; "
        "`reasoning.encrypted_content` has no effect, as there is none",
    )
    top_logprobs: int = Field(
        default=0,
        ge=0,
        le=20,
        description="log-probabilities of this many likeliest tokens as well; only with their name in `include`",
    )
    truncation: Literal["disabled", "auto"] = Field(
        default="disabled",
        description="`auto`, to drop what does not fit, is refused where the operator limits the length; "
        "elsewhere everything fits",
    )
    metadata: Annotated[dict[str, str], PlainValidator(_check_metadata), WithJsonSchema(_METADATA_SCHEMA)] = Field(
        default={}, description="texts of the client's own, told in the answer"
    )
    user: str | None = Field(default=None, description="who asks, in the client's words; told in the answer")

    @model_validator(mode="after")
    def _check_together(self) -> ResponsesRequest:
        if self.top_logprobs and not self.has_logprobs:
            raise BodyError(f"'top_logprobs' needs '{LOGPROBS}' in 'include'", "top_logprobs")
        if self.has_logprobs and self.tools:
            raise BodyError(f"'include' may not hold '{LOGPROBS}' when there are 'tools'", "include")
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return LOGPROBS in self.include


class OutputText(BaseModel):
    """A piece of a message."""

    type: Literal["output_text"] = Field(default="output_text", description="what this is")
    text: str = Field(description="what the model says")
    annotations: list[dict[str, Any]] = Field(default=[], description="always empty")
    logprobs: list[dict[str, Any]] = Field(
        default=[], description="if asked for: `token`, `logprob`, `bytes` and `top_logprobs` of each token"
    )


class OutputItem(BaseModel):
    """What every item tells."""

    id: str = Field(description="of the item")
    status: Literal["in_progress", "completed", "incomplete"] = Field(description="incomplete: cut by a limit")


class OutputMessage(OutputItem):
    """What the model says."""

    type: Literal["message"] = Field(default="message", description="what this is")
    role: Literal["assistant"] = Field(default="assistant", description="who speaks")
    content: list[OutputText] = Field(description="the text, in one piece")


class OutputCall(OutputItem):
    """A call of a function."""

    type: Literal["function_call"] = Field(default="function_call", description="what this is")
    call_id: str = Field(description="for the item that answers the call")
    name: str = Field(description="of the function")
    arguments: str = Field(description="text of a JSON object")


class InputTokensDetails(BaseModel):
    """Where input tokens came from."""

    cached_tokens: int = Field(description="input tokens that did not have to be computed")
    cache_write_tokens: int = Field(description="always 0")


class OutputTokensDetails(BaseModel):
    """What output tokens were for."""

    reasoning_tokens: int = Field(description="always 0")


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int = Field(description="tokens of the whole conversation before the answer")
    input_tokens_details: InputTokensDetails = Field(description="where they came from")
    output_tokens: int = Field(description="tokens generated")
    output_tokens_details: OutputTokensDetails = Field(description="what they were for")
    total_tokens: int = Field(description="the sum of both")


class ResponseProblem(BaseModel):
    """Why a response failed."""

    code: str = Field(description="a word for programs")
    message: str = Field(description="for people")


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"] = Field(description="which limit was reached")


class ResponseObject(BaseModel):
    """The answer. A streamed one is made of OpenAI's typed events, from `response.created` to `response.completed`,
    `response.incomplete` or `response.failed`, each with a `sequence_number`; nothing follows the last of them.

    Beside these fields it has those of the request, with their defaults.
    """

    id: str = Field(description="`resp_` and a random part, to get, delete or go on after it")
    object: Literal["response"] = Field(default="response", description="what this is")
    created_at: int = Field(description="when the request came, in seconds since 1970")
    model: str = Field(description="the name that was asked for, or the first one")
    status: Literal["in_progress", "completed", "incomplete", "failed"] = Field(
        description="incomplete: cut by a limit; the others occur only in streams"
    )
    error: ResponseProblem | None = Field(default=None, description="why it failed")
    incomplete_details: IncompleteDetails | None = Field(default=None, description="why it is incomplete")
    output: list[OutputMessage | OutputCall] = Field(description="messages and calls, in the model's order")
    usage: ResponseUsage | None = Field(default=None, description="token counts; null until it is over")
    store: bool = Field(description="whether it is kept; false where the server keeps none, or none so large")
    previous_response_id: str | None = Field(default=None, description="the response that this one goes on after")


class DeletedResponse(BaseModel):
    """A response that is not kept any more."""

    id: str = Field(description="of the response")
    object: Literal["response"] = Field(default="response", description="what it was")
    deleted: Literal[True] = Field(default=True, description="always true")
