"""`POST /v1/chat/completions`: the request, field by field, and the shape of its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from app.schemas.answers import AnswerHead, ChoiceEnd, PromptTold
from app.schemas.generation import GenerationFields
from app.schemas.json import BodyError
from app.schemas.messages import MESSAGES_SCHEMA, Message, check_ending, check_messages
from app.schemas.tools import TOOL_CHOICE_SCHEMA, TOOLS_SCHEMA, Tool, check_tool_choice, check_tools
from app.schemas.wire import INT32_MAX


class ChatRequest(GenerationFields):
    """A request to go on with a conversation. Null is the same as leaving a field out; unknown fields are ignored."""

    messages: Annotated[list[Message], PlainValidator(check_messages), WithJsonSchema(MESSAGES_SCHEMA)] = Field(
        description="the conversation, oldest message first; control tokens in it are plain text"
    )
    max_completion_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT32_MAX,
        description="most tokens to generate per choice; left out, until the model stops or a limit is reached",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, le=INT32_MAX, description="older name of `max_completion_tokens`, which wins"
    )
    logprobs: bool = Field(default=False, description="log-probability of each token")
    top_logprobs: int = Field(
        default=0, ge=0, le=20, description="of this many likeliest tokens as well; only together with `logprobs`"
    )
    tools: Annotated[list[Tool], PlainValidator(check_tools), WithJsonSchema(TOOLS_SCHEMA)] = Field(
        default=[], description="functions that the model may call, where its chat template has a place for them"
    )
    tool_choice: Annotated[str | Tool | None, PlainValidator(check_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)] = (
        Field(
            default=None,
            description="whether a tool is called: `none`, `auto` (the model decides, default with `tools`), "
            "`required`, or one function by name",
        )
    )
    parallel_tool_calls: bool = Field(default=True, description="false: at most one call is answered")
    add_generation_prompt: bool = Field(
        default=True, description="end the prompt with what opens a message of the assistant"
    )
    continue_final_message: bool = Field(
        default=False,
        description="go on inside the last message instead of beginning a new one; "
        "`add_generation_prompt` is false then, and may not be true",
    )
    add_special_tokens: bool = Field(
        default=False, description="let the tokenizer add what it adds by itself; templates have it already"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="more variables for the chat template, if the operator allows it"
    )

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise BodyError("'top_logprobs' is allowed only when 'logprobs' is true", "top_logprobs")
        check_ending(self, opens=self.add_generation_prompt, continues=self.continue_final_message)
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise BodyError("'tool_choice' needs 'tools'", "tool_choice")
        named = self.named_tool
        if named is not None and named not in (tool["function"]["name"] for tool in self.tools):
            raise BodyError("'tool_choice' names a function that is not among 'tools'", "tool_choice")
        return self

    @property
    def named_tool(self) -> str | None:
        """The function that has to be called."""
        return self.tool_choice["function"]["name"] if isinstance(self.tool_choice, dict) else None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools


class ChatFunction(BaseModel):
    """Which function is called, and with what."""

    name: str = Field(description="of the function")
    arguments: str = Field(description="text of a JSON object")


class ChatToolCall(BaseModel):
    """One call; in a stream first with `index`, `id` and name, then with arguments."""

    id: str = Field(description="for the message that answers it")
    type: Literal["function"] = Field(default="function", description="what is called")
    function: ChatFunction = Field(description="which function, and with what")


class ChatMessage(BaseModel):
    """What the model says; in a stream each chunk has a `delta` with what is new of it."""

    role: Literal["assistant"] = Field(default="assistant", description="who speaks")
    content: str | None = Field(description="text; null where there are only calls of tools")
    refusal: None = Field(default=None, description="always null")
    tool_calls: list[ChatToolCall] | None = Field(default=None, description="calls of tools; left out without any")


class ChatTopLogprob(BaseModel):
    """A token that could have been drawn."""

    token: str = Field(description="its text; `bytes:` and escapes for a part of a character")
    logprob: float = Field(description="natural logarithm")
    bytes: list[int] = Field(description="its text in UTF-8")


class ChatTokenLogprob(ChatTopLogprob):
    """A token that was drawn."""

    top_logprobs: list[ChatTopLogprob] = Field(description="the likeliest tokens, as many as were asked for")


class ChatLogprobs(BaseModel):
    """Log-probabilities of what was generated."""

    content: list[ChatTokenLogprob] = Field(description="one entry per token")
    refusal: None = Field(default=None, description="always null")


class ChatChoice(ChoiceEnd):
    """One answer of `n`."""

    index: int = Field(description="which of the `n` answers this is")
    message: ChatMessage = Field(description="what the model says")
    logprobs: ChatLogprobs | None = Field(default=None, description="null unless asked for")
    finish_reason: Literal["stop", "length", "tool_calls"] | None = Field(
        default=None, description="null while a stream goes on"
    )


class ChatCompletion(AnswerHead, PromptTold):
    """The answer; a streamed one is made of `chat.completion.chunk` objects with a `delta` in place of each message."""

    id: str = Field(description="`chatcmpl-` and the id of the request")
    object: Literal["chat.completion"] = Field(default="chat.completion", description="what this is")
    choices: list[ChatChoice] = Field(description="one for each of the `n` samples")
