"""`POST /v1/messages`, Anthropic's way to go on with a conversation: the request, and the shape of its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from app.schemas.generation import MAX_STOP_CHARACTERS, MAX_STOPS
from app.schemas.messages import MESSAGES_SCHEMA, Message, check_messages, check_text, text_schema
from app.schemas.sampling import DrawingFields, ModelName
from app.schemas.wire import INT32_MAX, WireModel


def _check_system(value: Any) -> str:
    return check_text(value, "system", "text")


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_SYSTEM_SCHEMA = text_schema("text")


class ConversationFields(WireModel):
    """What was said so far."""

    messages: Annotated[list[Message], PlainValidator(check_messages), WithJsonSchema(MESSAGES_SCHEMA)] = Field(
        description="the conversation, oldest message first; one of the assistant at its end is continued"
    )
    system: Annotated[str | None, PlainValidator(_check_system), WithJsonSchema(_SYSTEM_SCHEMA)] = Field(
        default=None, description="a system message before all others"
    )


class CountTokensRequest(ConversationFields):
    """A conversation whose tokens are counted. Null is the same as leaving a field out; unknown fields are ignored."""

    model: ModelName = Field(default=None, description="name of the model; the served one when left out")


class MessagesRequest(ConversationFields, DrawingFields):
    """A request to go on with a conversation. Null is the same as leaving a field out; unknown fields are ignored."""

    max_tokens: int = Field(ge=1, le=INT32_MAX, description="most tokens to generate")
    stop_sequences: list[Stop] = Field(
        default=[], max_length=MAX_STOPS, description="strings that end the answer and are cut from it"
    )
    temperature: float = Field(
        default=1.0, ge=0, le=1, description="0 (or below 0.00001) takes the likeliest token, higher values vary more"
    )


class TextBlock(BaseModel):
    """What the model says."""

    type: Literal["text"] = Field(default="text", description="what this is")
    text: str = Field(description="the text")


class MessagesUsage(BaseModel):
    """Token counts."""

    input_tokens: int = Field(description="tokens of the conversation")
    output_tokens: int = Field(description="tokens generated")


class TokenCount(BaseModel):
    """What `POST /v1/messages` would tell as `input_tokens`."""

    input_tokens: int = Field(description="tokens of the conversation")


class AnthropicMessage(BaseModel):
    """The answer; a streamed one is made of Anthropic's events, from `message_start` to `message_stop` or `error`."""

    id: str = Field(description="`msg_` and the id of the request")
    type: Literal["message"] = Field(default="message", description="what this is")
    role: Literal["assistant"] = Field(default="assistant", description="who speaks")
    model: str = Field(description="the name that was asked for, or the first one")
    content: list[TextBlock] = Field(description="the text, in one piece")
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"] | None = Field(description="why it ended")
    stop_sequence: str | None = Field(default=None, description="the client's string that ended it")
    usage: MessagesUsage = Field(description="token counts")
