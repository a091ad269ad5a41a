"""Writes docs/LIMITS.md, every bound in one table, from the settings and constants themselves: ``make docs``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from app.api import middleware
from app.api.protocol import ConnectionLimits
from app.cli import shown_default
from app.engine import grammars
from app.engine.client import journal
from app.serving import chat_sandbox, chat_template
from app.serving.limits import ServingLimits
from app.settings import Settings, flag_name

LIMITS = Path(__file__).resolve().parents[1] / "docs" / "LIMITS.md"

_INTRODUCTION = """# Limits

<!-- written by `make docs` -->

Everything that is bounded, in the order in which a request meets it. What has a flag is the operator's to set, and the figure is
its default. Whatever is refused with a status costs next to nothing, and every refusal has the one body of all errors.

"""  # noqa: E501 (lines of prose are longer here)
# what the constants of the schemas bound
FIELDS = {
    "generation.MAX_STOPS": "`stop`, `stop_sequences`: strings",
    "generation.MAX_STOP_CHARACTERS": "`stop`, `stop_sequences`: characters of a string",
    "generation.MAX_STOP_TOKEN_IDS": "`stop_token_ids`: ids",
    "generation.MAX_LOGIT_BIAS": "`logit_bias`: ids",
    "sampling.MAX_NAME_CHARACTERS": "`model`: characters",
    "messages.MAX_MESSAGES": "`messages`, `input`: messages or items",
    "messages.MAX_PARTS": "`messages`, `input`, `system`: parts of one message",
    "messages.MAX_MESSAGE_CHARACTERS": "`messages`: characters of all contents",
    "messages.MAX_NAME_CHARACTERS": "`messages`: characters of `name` and `tool_call_id`",
    "tools.MAX_TOOL_CALLS": "`messages`: calls of tools in one message",
    "tools.MAX_TOOLS": "`tools`: functions",
    "tools.MAX_TOOL_CHARACTERS": "`tools`: characters of JSON; also of the arguments of a call in `messages`",
    "token_rules.MAX_ALLOWED_TOKEN_IDS": "`allowed_token_ids`: ids",
    "token_rules.MAX_BAD_WORDS": "`bad_words`: strings",
    "token_rules.MAX_BAD_WORD_CHARACTERS": "`bad_words`: characters of a string",
    "token_rules.MAX_SESSION_CHARACTERS": "`session_id`: characters",
    "token_rules.MAX_SALT_CHARACTERS": "`cache_salt`: characters",
    "output_format.MAX_CHOICES": "`structured_outputs.choice`: strings",
    "output_format.MAX_FORMAT_NAME_CHARACTERS": "`response_format.json_schema.name`, `text.format.name`: characters",
    "responses.MAX_METADATA": "`metadata`: keys",
    "responses.MAX_METADATA_KEY_CHARACTERS": "`metadata`: characters of a key",
    "responses.MAX_METADATA_CHARACTERS": "`metadata`: characters of a value",
    "responses.MAX_RESPONSE_ID_CHARACTERS": "`previous_response_id`: characters",
}
_UNSET = {"max_num_seqs": "as memory allows"}


@dataclass(frozen=True, slots=True)
class Limit:
    """One row. ``setting`` is a field of Settings, or else ``value`` tells what is fixed."""

    what: str
    beyond: str
    setting: str | None = None
    value: str = ""

    def render(self) -> str:
        """A line of the table."""
        figure, source = self.value, "fixed"
        if self.setting is not None:
            field = Settings.model_fields[self.setting]
            figure = shown_default(field) if field.default else _UNSET.get(self.setting, "none")
            source = f"`{flag_name(self.setting)}`"
        return f"| {self.what} | {figure} | {source} | {self.beyond} |"


def limits() -> dict[str, tuple[Limit, ...]]:
    """All of them, by what they bound."""
    connection = ConnectionLimits()
    return {
        "Connections": (
            Limit("open connections", "503, closed", "max_connections"),
            Limit("seconds for the headers to arrive", "408, closed", "header_timeout"),
            Limit("bytes of request line and headers", "431, closed", value=f"{connection.max_header_bytes}"),
            Limit("headers", "431, closed", value=f"{connection.max_headers}"),
            Limit("characters of `X-Request-Id`", "the rest is left out", value=f"{middleware.MAX_ID_CHARACTERS}"),
            Limit("seconds in which a client reads nothing of a stream", "cut", "write_timeout"),
            Limit("seconds of silence in a stream", "a comment is sent", "ping_interval"),
        ),
        "Keys, by name": (
            Limit("requests open at once", "429", "key_max_concurrency"),
            Limit("requests in any 60 seconds", "429", "key_requests_per_minute"),
            Limit("tokens in any 60 seconds, of requests that are over", "429", "key_tokens_per_minute"),
        ),
        "The whole server": (
            Limit("sequences that run at once, each in a slot", "they wait", "max_num_seqs"),
            Limit("sequences that wait beside them", "429", "max_queue"),
            Limit("prompt tokens that wait", "429", "max_queue_tokens"),
            Limit("bytes of bodies that `/tokenize` and `/detokenize` work on at once", "429", "max_body_size"),
            Limit("seconds of one step of the engine", "`/readyz` 503; twice that, `/livez` 503", "heartbeat_timeout"),
            Limit(
                "bytes of what the engine told of open requests, with which they go on if it dies",
                "the oldest do not go on",
                value=str(journal.MAX_BYTES),
            ),
            Limit("seconds to finish after SIGTERM", "an error event, or 503", "shutdown_timeout"),
        ),
        "One request": (
            Limit("bytes of the body", "413", "max_body_size"),
            Limit("seconds for the body to arrive", "408", "body_timeout"),
            Limit(
                "seconds for all of it; `X-Request-Timeout` may ask for less",
                "408, or an error event",
                "max_request_seconds",
            ),
            Limit("tokens of prompt plus output", "400 `context_length_exceeded`", "max_model_len"),
            Limit("prompts", "400", "max_prompts"),
            Limit("continuations of a prompt, and no more than there are slots", "400", "max_n"),
            *_field_limits(),
        ),
        "Responses that are kept": (
            Limit("responses", "those not used for longest give way", "max_stored_responses"),
            Limit("bytes of answers and their conversations", "the same", "max_stored_bytes"),
        ),
    }


def render(groups: Mapping[str, Sequence[Limit]]) -> str:
    """The whole file."""
    lines = ["| what | limit | set by | beyond it |", "| --- | --- | --- | --- |"]
    for title, rows in groups.items():
        lines += [f"| **{title}** | | | |", *(row.render() for row in rows)]
    return _INTRODUCTION + "\n".join(lines) + "\n"


def _field_limits() -> tuple[Limit, ...]:
    limits = ServingLimits()
    scores = "log-probabilities of prompts in an answer that is not streamed: prompt tokens x (`logprobs` + 1) x `n`"
    return (
        *(Limit(what, "400", value=str(constant(name))) for name, what in FIELDS.items()),
        Limit(
            "bytes of a JSON schema, regular expression, list of choices or grammar",
            "400",
            value=str(grammars.MAX_SOURCE_BYTES),
        ),
        Limit("seconds to render a chat template", "400", value=f"{chat_sandbox.MAX_SECONDS:g}"),
        Limit(
            "characters of a rendered chat template",
            "400",
            value=f"{chat_sandbox.MAX_CHARACTERS} + {chat_template.CHARACTERS_PER_CHARACTER} x those of the request",
        ),
        Limit(scores, "400", value=str(limits.max_prompt_logprobs)),
        Limit(
            "bytes of a prompt's log-probabilities that wait in a stream",
            "an error event",
            value=str(limits.max_waiting_bytes),
        ),
    )


def constant(name: str) -> int:
    """A number of ``app.schemas``, by module and name."""
    module, _, attribute = name.partition(".")
    return int(getattr(import_module(f"app.schemas.{module}"), attribute))


def main() -> int:
    LIMITS.write_text(render(limits()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
