"""Which model, and how it draws its tokens: the fields that all requests for tokens share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from app.schemas.token_rules import SessionId
from app.schemas.wire import INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, WireModel, refuse

MAX_NAME_CHARACTERS = 256


def _check_name(value: Any) -> str:
    if not isinstance(value, str):
        raise refuse("name_type", "should be a string")
    if not 1 <= len(value) <= MAX_NAME_CHARACTERS or not value.isprintable():
        raise refuse("name_form", f"should be 1 to {MAX_NAME_CHARACTERS} printable characters")
    return value


_NAME_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARACTERS}
ModelName = Annotated[str | None, PlainValidator(_check_name), WithJsonSchema(_NAME_SCHEMA)]


class DrawingFields(WireModel):
    """Fields of every kind of request."""

    model: ModelName = Field(default=None, description="name of the model; the served one when left out")
    temperature: float = Field(
        default=1.0, ge=0, le=2, description="0 (or below 0.00001) takes the likeliest token, higher values vary more"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw from the likeliest tokens that together have this probability"
    )
    top_k: int = Field(
        default=0, ge=-1, le=INT32_MAX, description="draw from this many of the likeliest tokens; 0 or -1 for all"
    )
    stream: bool = Field(default=False, description="answer with server-sent events while tokens come")


class SamplingFields(DrawingFields):
    """Fields of all requests in OpenAI's forms."""

    min_p: float = Field(
        default=0.0, ge=0, le=1, description="leave out tokens less likely than this share of the likeliest one"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="taken once from the logit of every token generated already"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="taken from a token's logit for each time it was generated already"
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="divides positive and multiplies negative logits of tokens seen, prompt included",
    )
    seed: int | None = Field(
        default=None, ge=INT64_MIN, le=INT64_MAX, description="the same seed gives the same tokens; drawn when left out"
    )
    priority: int = Field(
        default=0,
        ge=INT32_MIN,
        le=INT32_MAX,
        description="of the requests that wait, those with the lowest number begin first",
    )
    session_id: SessionId = Field(
        default=None,
        description="a name for the conversation that this request is a part of, told in the server's log "
        "and in the answer's `X-Session-ID`; the request's header of that name does the same where this is left out",
    )
