"""What every request for tokens may say, whatever its prompt looks like: sampling, ends, and how to answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from app.schemas.json import BodyError
from app.schemas.output_format import OutputFields
from app.schemas.sampling import SamplingFields
from app.schemas.token_rules import MAX_SALT_CHARACTERS, AllowedTokenIds, BadWords, Truncation
from app.schemas.wire import INT32_MAX, WireModel, refuse

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise refuse("stop_type", "should be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise refuse("stop_count", f"should hold at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str):
            raise refuse("stop_type", "should be a string or a list of strings")
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise refuse("stop_length", f"should hold strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _check_stop_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise refuse("token_ids_type", "should be a list of token ids (integers)")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise refuse("token_ids_count", f"should hold at most {MAX_STOP_TOKEN_IDS} token ids")
    if value and (min(value) < 0 or max(value) > INT32_MAX):
        raise refuse("token_id_range", "holds a token id outside the vocabulary")
    return value


def _check_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise refuse("logit_bias_type", "should be an object that maps token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise refuse("logit_bias_count", f"should have at most {MAX_LOGIT_BIAS} keys")
    return {_bias_key(key): _bias_value(bias) for key, bias in value.items()}


def _bias_key(key: str) -> int:
    # the one decimal spelling of an id: no sign, no leading zero, no digits of other scripts
    if not (key.isascii() and key.isdecimal() and len(key) <= 10 and (key == "0" or key[0] != "0")):
        raise refuse("logit_bias_key", "has a key that is not a token id")
    return int(key)


def _bias_value(bias: Any) -> float:
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
        raise refuse("logit_bias_value", "has a value that is not a number from -100 to 100")
    return float(bias)


_STOP_TEXT_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA = {"anyOf": [_STOP_TEXT_SCHEMA, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_TEXT_SCHEMA}]}
_BIAS_SCHEMA = {
    "type": "object",
    "maxProperties": MAX_LOGIT_BIAS,
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_STOP_IDS_SCHEMA = {"type": "array", "maxItems": MAX_STOP_TOKEN_IDS, "items": {"type": "integer", "minimum": 0}}


class StreamOptions(WireModel):
    """What a stream tells beside text."""

    include_usage: bool = Field(default=False, description="one more chunk before the end, with usage and no choices")
    continuous_usage_stats: bool = Field(
        default=False, description="usage so far in every chunk; has an effect only together with `include_usage`"
    )


class GenerationFields(OutputFields, SamplingFields):
    """What completions and chats have in common."""

    n: int = Field(default=1, ge=1, le=INT32_MAX, description="choices per prompt, up to the operator's limit")
    stream_options: StreamOptions | None = Field(default=None, description="only together with `stream`")
    stop: Annotated[list[str], PlainValidator(_check_stop), WithJsonSchema(_STOP_SCHEMA)] = Field(
        default=[], description=f"up to {MAX_STOPS} strings that end a choice and are cut from it"
    )
    stop_token_ids: Annotated[list[int], PlainValidator(_check_stop_token_ids), WithJsonSchema(_STOP_IDS_SCHEMA)] = (
        Field(default=[], description="token ids that end a choice, beside end-of-text")
    )
    include_stop_str_in_output: bool = Field(default=False, description="keep the stop string or stop token's text")
    ignore_eos: bool = Field(
        default=False, description="go on after end-of-text; an output that is held to a form ends when it is complete"
    )
    skip_special_tokens: bool = Field(default=True, description="leave special tokens out of the text")
    logit_bias: Annotated[dict[int, float], PlainValidator(_check_logit_bias), WithJsonSchema(_BIAS_SCHEMA)] = Field(
        default={}, description="added to the logits of these token ids, from -100 to 100"
    )
    min_tokens: int = Field(
        default=0,
        ge=0,
        le=INT32_MAX,
        description="no end-of-text, stop token or stop string ends a choice before it has this many tokens; "
        "at most as many as may be generated",
    )
    allowed_token_ids: AllowedTokenIds = Field(default=None, description="draw from these token ids alone")
    bad_words: BadWords = Field(
        default=[], description="words that are never generated, neither at a text's beginning nor after a space"
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="log-probability of each prompt token, and of this many likeliest beside it; not with `stream`",
    )
    return_token_ids: bool = Field(default=False, description="tell the ids of the prompt's and the output's tokens")
    return_tokens_as_token_ids: bool = Field(
        default=False, description="name tokens in log-probabilities `token_id:123` instead of by their text"
    )
    truncate_prompt_tokens: Truncation = Field(
        default=None,
        description="keep this many tokens of a prompt, the last ones; -1: as many as the operator's limit "
        "of length leaves beside the output",
    )
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_SALT_CHARACTERS,
        description="requests share computed prompts only with those of the same salt; "
        "no effect, as no two requests share any",
    )
    user: str | None = Field(default=None, description="who asks, in the client's words; not interpreted")

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise BodyError("'stream_options' is allowed only when 'stream' is true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise BodyError("'prompt_logprobs' is not allowed when 'stream' is true", "prompt_logprobs")
        return self
