"""`POST /v1/completions`: the request, field by field, and the shape of its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from app.schemas.answers import AnswerHead, ChoiceEnd, PromptTold
from app.schemas.generation import GenerationFields
from app.schemas.json import BodyError
from app.schemas.wire import INT32_MAX, refuse

Prompt = str | list[str] | list[int] | list[list[int]]


def _check_prompt(value: Any) -> Prompt:
    """Sets of types instead of a pydantic union: one pass in C over 100,000 ids, and one clear message."""
    if isinstance(value, str):
        if not value:
            raise refuse("prompt_empty", "should not be empty")
        return value
    if not isinstance(value, list):
        raise refuse("prompt_type", "should be a string, a list of strings, a list of token ids, or a list of those")
    if not value:
        raise refuse("prompt_empty", "should not be an empty list")
    types = set(map(type, value))
    if types == {list}:
        for ids in value:
            _check_ids(ids, set(map(type, ids)))
    elif types == {str}:
        if "" in value:
            raise refuse("prompt_empty", "should not hold an empty string")
    else:
        _check_ids(value, types)
    return value


def _check_ids(ids: list[Any], types: set[type]) -> None:
    if not ids:
        raise refuse("prompt_empty", "should not hold an empty list")
    if types != {int}:
        raise refuse("prompt_type", "should hold strings alone, or token ids (integers) alone, or lists of token ids")
    if min(ids) < 0 or max(ids) > INT32_MAX:
        raise refuse("token_id_range", "holds a token id outside the vocabulary")


_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        _IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _IDS_SCHEMA},
    ]
}


class CompletionRequest(GenerationFields):
    """A request to continue text. Null means the same as leaving a field out; unknown fields are ignored."""

    prompt: Annotated[Prompt, PlainValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="text, several texts, token ids, or several lists of token ids; nothing empty"
    )
    max_tokens: int = Field(
        default=16,
        ge=0,
        le=INT32_MAX,
        description="most tokens to generate per choice; 0 only with `echo`; left out, at most what a limit allows",
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="log-probability of each token, and of this many likeliest beside it"
    )
    echo: bool = Field(default=False, description="start each choice with the prompt")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=INT32_MAX,
        description="samples to generate per prompt, of which the `n` with the highest log-probability per token are "
        "answered, best first; all are counted in `usage`; at least `n`, up to the operator's limit; not with `stream`",
    )
    suffix: str | None = Field(
        default=None,
        description="text that comes after what is generated, where the tokenizer has tokens to fill in the middle; "
        "only with prompts of text, not with `echo` or `truncate_prompt_tokens`; empty means none",
    )
    add_special_tokens: bool = Field(
        default=True, description="let the tokenizer add what it adds by itself to a text prompt, such as a first token"
    )

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise BodyError("'max_tokens' should be at least 1 unless 'echo' is true", "max_tokens")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise BodyError(f"'best_of' should be at least 'n', which is {self.n}", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise BodyError("'best_of' above 'n' is not allowed when 'stream' is true", "best_of")
        return self

    @model_validator(mode="after")
    def _check_suffix(self) -> CompletionRequest:
        if not self.suffix:
            return self
        if isinstance(self.prompt[0], (int, list)):
            raise BodyError("'suffix' needs a 'prompt' of text", "suffix")
        if self.echo:
            raise BodyError("'suffix' is not allowed when 'echo' is true", "suffix")
        if self.truncate_prompt_tokens is not None:
            raise BodyError("'suffix' is not allowed together with 'truncate_prompt_tokens'", "suffix")
        return self

    @property
    def num_samples(self) -> int:
        """Samples to generate per prompt."""
        return self.n if self.best_of is None else self.best_of


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry per token."""

    tokens: list[str] = Field(description="each token's text; `bytes:` and escapes for a part of a character")
    token_logprobs: list[float | None] = Field(description="natural logarithms; null for the first echoed token")
    top_logprobs: list[dict[str, float] | None] = Field(description="the likeliest tokens, the drawn one included")
    text_offset: list[int] = Field(description="where each token's text starts in the choice's text, in characters")


class CompletionChoice(ChoiceEnd, PromptTold):
    """One continuation; `index` is prompt number x `n` + sample number."""

    index: int = Field(description="which choice this is")
    text: str = Field(description="what was generated, after the prompt where it is echoed; a part of it in a stream")
    logprobs: CompletionLogprobs | None = Field(default=None, description="null unless asked for")
    finish_reason: Literal["stop", "length"] | None = Field(default=None, description="null while a stream goes on")


class Completion(AnswerHead):
    """The answer, and with fewer fields every chunk of a streamed one."""

    id: str = Field(description="`cmpl-` and the id of the request")
    object: Literal["text_completion"] = Field(default="text_completion", description="what this is")
    choices: list[CompletionChoice] = Field(description="one for each prompt and each of its `n` samples")
