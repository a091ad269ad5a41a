"""`POST /tokenize` and `POST /detokenize`: requests and answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from app.schemas.json import BodyError
from app.schemas.messages import MESSAGES_SCHEMA, Message, check_ending, check_messages
from app.schemas.sampling import ModelName
from app.schemas.tools import TOOLS_SCHEMA, Tool, check_tools
from app.schemas.wire import INT32_MAX, WireModel, refuse


def _check_tokens(value: Any) -> list[int]:
    """Sets of types instead of pydantic's list: one pass in C over 100,000 ids, and one clear message."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise refuse("token_ids_type", "should be a list of token ids (integers)")
    if value and (min(value) < 0 or max(value) > INT32_MAX):
        raise refuse("token_id_range", "holds a token id outside the vocabulary")
    return value


# without a conversation these would change nothing
_OF_MESSAGES = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}}


class TokenizeRequest(WireModel):
    """A text or a conversation, of which one is required. Null means the same as leaving a field out."""

    model: ModelName = Field(default=None, description="name of the model; the served one when left out")
    prompt: str | None = Field(default=None, description="a text, which may be empty; not together with `messages`")
    messages: Annotated[list[Message] | None, PlainValidator(check_messages), WithJsonSchema(MESSAGES_SCHEMA)] = Field(
        default=None, description="a conversation as `/v1/chat/completions` takes it; not together with `prompt`"
    )
    tools: Annotated[list[Tool], PlainValidator(check_tools), WithJsonSchema(TOOLS_SCHEMA)] = Field(
        default=[], description="functions that the model is told of; only together with `messages`"
    )
    add_generation_prompt: bool = Field(
        default=True,
        description="end with what opens a message of the assistant; only together with `messages`, and not with "
        "`continue_final_message`",
    )
    continue_final_message: bool = Field(
        default=False, description="end inside the last message; only together with `messages`"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={},
        description="more variables for the chat template, if the operator allows it; only together with `messages`",
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="let the tokenizer add what it adds by itself, such as a first token; left out, true for `prompt` "
        "and false for `messages`, whose template adds it",
    )
    return_token_strs: bool = Field(default=False, description="answer the text of each token as well")

    @model_validator(mode="after")
    def _check_what(self) -> TokenizeRequest:
        if self.prompt is None and self.messages is None:
            raise BodyError("'prompt' or 'messages' is required", "prompt")
        if self.prompt is not None and self.messages is not None:
            raise BodyError("'messages' is not allowed together with 'prompt'", "messages")
        for name in _OF_MESSAGES:
            if self.messages is None and name in self.model_fields_set:
                raise BodyError(f"'{name}' is allowed only together with 'messages'", name)
        check_ending(self, opens=self.add_generation_prompt, continues=self.continue_final_message)
        return self

    @property
    def opens_answer(self) -> bool:
        """Whether the text ends with what opens a message of the assistant."""
        return self.add_generation_prompt and not self.continue_final_message


class DetokenizeRequest(WireModel):
    """Token ids. Null means the same as leaving a field out; unknown fields are ignored."""

    model: ModelName = Field(default=None, description="name of the model; the served one when left out")
    tokens: Annotated[list[int], PlainValidator(_check_tokens), WithJsonSchema(_TOKENS_SCHEMA)] = Field(
        description="token ids of the model's vocabulary; none give an empty text"
    )


class Tokens(BaseModel):
    """What a text is for the model."""

    count: int = Field(description="how many tokens")
    max_model_len: int | None = Field(description="most tokens of prompt plus output; null for no limit")
    tokens: list[int] = Field(description="token ids")
    token_strs: list[str] | None = Field(
        description="each token's text, `bytes:` and escapes for a part of a character; null unless asked for"
    )


class DetokenizedText(BaseModel):
    """What tokens are for a reader."""

    prompt: str = Field(description="the text, special tokens included")
