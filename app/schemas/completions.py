"""`POST /v1/completions`: the request, field by field, and the shape of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from app.schemas.json import BodyError, parse_object

INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_NAME_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024

Prompt = str | list[str] | list[int] | list[list[int]]


def _refuse(kind: str, message: str) -> PydanticCustomError:
    # the template is ours and never holds input, so that no brace of a client's is formatted
    return PydanticCustomError(kind, message)


def _check_prompt(value: Any) -> Prompt:
    """Sets of types instead of a pydantic union: one pass in C over 100,000 ids, and one clear message."""
    if isinstance(value, str):
        if not value:
            raise _refuse("prompt_empty", "should not be empty")
        return value
    if not isinstance(value, list):
        raise _refuse("prompt_type", "should be a string, a list of strings, a list of token ids, or a list of those")
    if not value:
        raise _refuse("prompt_empty", "should not be an empty list")
    types = set(map(type, value))
    if types == {list}:
        for ids in value:
            _check_ids(ids, set(map(type, ids)))
    elif types == {str}:
        if "" in value:
            raise _refuse("prompt_empty", "should not hold an empty string")
    else:
        _check_ids(value, types)
    return value


def _check_ids(ids: list[Any], types: set[type]) -> None:
    if not ids:
        raise _refuse("prompt_empty", "should not hold an empty list")
    if types != {int}:
        raise _refuse("prompt_type", "should hold strings alone, or token ids (integers) alone, or lists of token ids")
    if min(ids) < 0 or max(ids) > INT32_MAX:
        raise _refuse("token_id_range", "holds a token id outside the vocabulary")


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise _refuse("stop_type", "should be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise _refuse("stop_count", f"should hold at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str):
            raise _refuse("stop_type", "should be a string or a list of strings")
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise _refuse("stop_length", f"should hold strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _check_stop_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise _refuse("token_ids_type", "should be a list of token ids (integers)")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise _refuse("token_ids_count", f"should hold at most {MAX_STOP_TOKEN_IDS} token ids")
    if value and (min(value) < 0 or max(value) > INT32_MAX):
        raise _refuse("token_id_range", "holds a token id outside the vocabulary")
    return value


def _check_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _refuse("logit_bias_type", "should be an object that maps token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise _refuse("logit_bias_count", f"should have at most {MAX_LOGIT_BIAS} keys")
    return {_bias_key(key): _bias_value(bias) for key, bias in value.items()}


def _bias_key(key: str) -> int:
    # the one decimal spelling of an id: no sign, no leading zero, no digits of other scripts
    if not (key.isascii() and key.isdecimal() and len(key) <= 10 and (key == "0" or key[0] != "0")):
        raise _refuse("logit_bias_key", "has a key that is not a token id")
    return int(key)


def _bias_value(bias: Any) -> float:
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
        raise _refuse("logit_bias_value", "has a value that is not a number from -100 to 100")
    return float(bias)


def _check_name(value: Any) -> str:
    if not isinstance(value, str):
        raise _refuse("name_type", "should be a string")
    if not 1 <= len(value) <= MAX_NAME_CHARACTERS or not value.isprintable():
        raise _refuse("name_form", f"should be 1 to {MAX_NAME_CHARACTERS} printable characters")
    return value


def _without_nulls(value: Any) -> Any:
    """JSON's null means that a field was left out."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        _IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _IDS_SCHEMA},
    ]
}
_STOP_TEXT_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA = {"anyOf": [_STOP_TEXT_SCHEMA, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_TEXT_SCHEMA}]}
_BIAS_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_LOGIT_BIAS,
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_STOP_IDS_SCHEMA = {"type": "array", "maxItems": MAX_STOP_TOKEN_IDS, "items": {"type": "integer", "minimum": 0}}
_NAME_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARACTERS}


class _WireModel(BaseModel):
    """Strict types, null as absent, fields that are not known kept aside."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    _drop_nulls = model_validator(mode="before")(_without_nulls)


class StreamOptions(_WireModel):
    """What a stream tells beside text."""

    include_usage: bool = Field(default=False, description="one more chunk before the end, with usage and no choices")
    continuous_usage_stats: bool = Field(
        default=False, description="usage so far in every chunk; has an effect only together with `include_usage`"
    )


class CompletionRequest(_WireModel):
    """A request to continue text. Null means the same as leaving a field out; unknown fields are ignored."""

    model: Annotated[str | None, PlainValidator(_check_name), WithJsonSchema(_NAME_SCHEMA)] = Field(
        default=None, description="name of the model; the served one when left out"
    )
    prompt: Annotated[Prompt, PlainValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="text, several texts, token ids, or several lists of token ids; nothing empty"
    )
    max_tokens: int = Field(
        default=16,
        ge=0,
        le=INT32_MAX,
        description="most tokens to generate per choice; 0 only with `echo`; left out, at most what a limit allows",
    )
    temperature: float = Field(
        default=1.0, ge=0, le=2, description="0 (or below 0.00001) takes the likeliest token, higher values vary more"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw from the likeliest tokens that together have this probability"
    )
    top_k: int = Field(
        default=0, ge=-1, le=INT32_MAX, description="draw from this many of the likeliest tokens; 0 or -1 for all"
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="leave out tokens less likely than this share of the likeliest one"
    )
    n: int = Field(default=1, ge=1, le=INT32_MAX, description="choices per prompt, up to the operator's limit")
    stream: bool = Field(default=False, description="answer with server-sent events while tokens come")
    stream_options: StreamOptions | None = Field(default=None, description="only together with `stream`")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="log-probability of each token, and of this many likeliest beside it"
    )
    echo: bool = Field(default=False, description="start each choice with the prompt")
    stop: Annotated[list[str], PlainValidator(_check_stop), WithJsonSchema(_STOP_SCHEMA)] = Field(
        default=[], description=f"up to {MAX_STOPS} strings that end a choice and are cut from it"
    )
    stop_token_ids: Annotated[list[int], PlainValidator(_check_stop_token_ids), WithJsonSchema(_STOP_IDS_SCHEMA)] = (
        Field(default=[], description="token ids that end a choice, beside end-of-text")
    )
    include_stop_str_in_output: bool = Field(default=False, description="keep the stop string or stop token's text")
    ignore_eos: bool = Field(default=False, description="go on after end-of-text")
    skip_special_tokens: bool = Field(default=True, description="leave special tokens out of the text")
    add_special_tokens: bool = Field(
        default=True, description="let the tokenizer add what it adds by itself to a text prompt, such as a first token"
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
    logit_bias: Annotated[dict[int, float], PlainValidator(_check_logit_bias), WithJsonSchema(_BIAS_SCHEMA)] = Field(
        default={}, description="added to the logits of these token ids, from -100 to 100"
    )
    seed: int | None = Field(
        default=None, ge=INT64_MIN, le=INT64_MAX, description="the same seed gives the same tokens; drawn when left out"
    )
    user: str | None = Field(default=None, description="who asks, in the client's words; not interpreted")

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise BodyError("'max_tokens' should be at least 1 unless 'echo' is true", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise BodyError("'stream_options' is allowed only when 'stream' is true", "stream_options")
        return self


def parse_completion(raw: bytes) -> CompletionRequest:
    """The request that a body holds. Raises BodyError, whose message names the first field that is wrong."""
    try:
        return CompletionRequest.model_validate(parse_object(raw))
    except ValidationError as error:
        raise _body_error(error.errors(include_url=False, include_input=False)[0]) from None


def _body_error(problem: Mapping[str, Any]) -> BodyError:
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, BodyError):
        return cause
    param = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return BodyError(f"'{param}' is required", param)
    message = str(problem["msg"]).removeprefix("Input ")
    return BodyError(f"'{param}' {message}", param)


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry per token."""

    tokens: list[str] = Field(description="each token's text; `bytes:` and escapes for a part of a character")
    token_logprobs: list[float | None] = Field(description="natural logarithms; null for the first echoed token")
    top_logprobs: list[dict[str, float] | None] = Field(description="the likeliest tokens, the drawn one included")
    text_offset: list[int] = Field(description="where each token's text starts in the choice's text, in characters")


class CompletionChoice(BaseModel):
    """One continuation; `index` is prompt number x `n` + sample number."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = Field(default=None, description="null while a stream goes on")
    stop_reason: int | str | None = Field(default=None, description="the stop string or token id; null for end-of-text")


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int = Field(description="prompt tokens that did not have to be computed")


class Usage(BaseModel):
    """Token counts; each prompt counts once, whatever `n`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(BaseModel):
    """The answer, and with fewer fields every chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
