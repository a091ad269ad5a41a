"""Lists of tokens and words that a request allows or forbids, and names that it bears."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from app.schemas.wire import INT32_MAX, refuse

MAX_ALLOWED_TOKEN_IDS = 65_536
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256
MAX_SESSION_CHARACTERS = 256
MAX_SALT_CHARACTERS = 256


def _check_allowed(value: Any) -> list[int]:
    if not isinstance(value, list) or set(map(type, value)) != {int}:
        raise refuse("token_ids_type", "should be a list of token ids (integers), and not empty")
    if len(value) > MAX_ALLOWED_TOKEN_IDS:
        raise refuse("token_ids_count", f"should hold at most {MAX_ALLOWED_TOKEN_IDS} token ids")
    if min(value) < 0 or max(value) > INT32_MAX:
        raise refuse("token_id_range", "holds a token id outside the vocabulary")
    return value


def _check_bad_words(value: Any) -> list[str]:
    if not isinstance(value, list) or not set(map(type, value)) <= {str}:
        raise refuse("bad_words_type", "should be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise refuse("bad_words_count", f"should hold at most {MAX_BAD_WORDS} strings")
    if not all(1 <= len(word) <= MAX_BAD_WORD_CHARACTERS and not word.isspace() for word in value):
        raise refuse(
            "bad_words_length",
            f"should hold strings of 1 to {MAX_BAD_WORD_CHARACTERS} characters, not of white space alone",
        )
    return value


def _check_truncation(value: Any) -> int:
    if type(value) is not int or not (value == -1 or 1 <= value <= INT32_MAX):
        raise refuse("truncation", f"should be -1, or a number of tokens from 1 to {INT32_MAX}")
    return value


def is_session_id(text: str) -> bool:
    """Whether a text can name a session: in a header, and in a line of a log."""
    return 1 <= len(text) <= MAX_SESSION_CHARACTERS and text.isascii() and text.isprintable()


def _check_session(value: Any) -> str:
    if not isinstance(value, str) or not is_session_id(value):
        raise refuse("session_id", f"should be a string of 1 to {MAX_SESSION_CHARACTERS} printable ASCII characters")
    return value


_ALLOWED_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_ALLOWED_TOKEN_IDS,
    "items": {"type": "integer", "minimum": 0},
}
_BAD_WORDS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_BAD_WORDS,
    "items": {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_CHARACTERS},
}
_TRUNCATION_SCHEMA = {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1, "maximum": INT32_MAX}]}
_SESSION_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_SESSION_CHARACTERS}

AllowedTokenIds = Annotated[list[int] | None, PlainValidator(_check_allowed), WithJsonSchema(_ALLOWED_SCHEMA)]
BadWords = Annotated[list[str], PlainValidator(_check_bad_words), WithJsonSchema(_BAD_WORDS_SCHEMA)]
Truncation = Annotated[int | None, PlainValidator(_check_truncation), WithJsonSchema(_TRUNCATION_SCHEMA)]
SessionId = Annotated[str | None, PlainValidator(_check_session), WithJsonSchema(_SESSION_SCHEMA)]
