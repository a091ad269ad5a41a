"""From messages to the text of a prompt: which template there is, and rendering it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.serving.errors import InvalidRequest, quote

if TYPE_CHECKING:
    from app.serving.chat_sandbox import ChatEnvironment

logger = logging.getLogger(__name__)

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}
{%- endif %}
{{- 'There are functions to call, each a line of JSON:\\n<tools>\\n' }}
{%- for tool in tools %}
{{- (tool | tojson) + '\\n' }}
{%- endfor %}
{{- '</tools>\\nA call is a JSON object with name and arguments:\\n' }}
{{- '<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) }}
{{- ', "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# name -> template, and the texts that end a message in it
BUILT_IN: Mapping[str, tuple[str, tuple[str, ...]]] = {"chatml": (CHATML, ("<|im_end|>",))}
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")

_MAX_TEMPLATE_BYTES = 2**20
# a prompt is the conversation and a few words around each message
CHARACTERS_PER_CHARACTER = 4
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


class TemplateError(Exception):
    """A template that cannot be read or compiled; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """Where prompts come from.

    texts: Jinja by name, "default" among them, unless there is only one of another name. ends: texts that end a
    message. variables: special tokens that templates write, such as ``bos_token``.
    """

    texts: Mapping[str, str]
    ends: tuple[str, ...] = ()
    variables: Mapping[str, str] | None = None


def load_template(name: str | None, *directories: Path) -> ChatTemplate | None:
    """The template of ``find_template``, compiled. A checkpoint's own that is wrong is none, which the log tells.

    Raises TemplateError where an operator names one that is wrong.
    """
    try:
        source = find_template(name, *directories)
        return None if source is None else ChatTemplate(source)
    except TemplateError as error:
        if name is not None:
            raise
        logger.warning("no conversations are served: %s", error)
        return None


def find_template(name: str | None, *directories: Path) -> TemplateSource | None:
    """The template that ``name`` says: a built-in one, or a file; without a name that of the first directory with one.

    Raises TemplateError.
    """
    variables: dict[str, str] = next((found for path in directories if (found := _special_tokens(path))), {})
    if name is None:
        texts = next((texts for path in directories if (texts := _of_directory(path))), None)
        return None if texts is None else TemplateSource(texts, _end_token(variables), variables)
    if name in BUILT_IN:
        text, ends = BUILT_IN[name]
        return TemplateSource({_DEFAULT: text}, ends, variables)
    return TemplateSource(_of_file(Path(name).expanduser()), _end_token(variables), variables)


def _end_token(variables: Mapping[str, str]) -> tuple[str, ...]:
    return (variables["eos_token"],) if variables.get("eos_token") else ()


def _of_directory(directory: Path) -> dict[str, str] | None:
    for name in TEMPLATE_FILES:
        path = directory / name
        if path.is_file() and (name.endswith(".jinja") or _read_object(path).get("chat_template")):
            return _of_file(path)
    return None


def _of_file(path: Path) -> dict[str, str]:
    if path.suffix != ".json":
        text = _read(path)
        if not text.strip():
            raise TemplateError(f"{path} holds no chat template")
        return {_DEFAULT: text}
    value = _read_object(path).get("chat_template")
    if isinstance(value, str) and value:
        return {_DEFAULT: value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(text, str) for pair in value.items() for text in pair)
    ):
        raise TemplateError(f"{path} holds no chat template")
    return dict(value)


def _special_tokens(directory: Path) -> dict[str, str]:
    path = directory / "tokenizer_config.json"
    config = _read_object(path) if path.is_file() else {}
    found = {}
    for key, value in config.items():
        # written as text, or as an object that says more of the token
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise TemplateError(f"{path} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TEMPLATE_BYTES + 1)
        if len(raw) > _MAX_TEMPLATE_BYTES and path.suffix != ".json":
            raise TemplateError(f"{path} is too large for a chat template")
        return (raw if len(raw) <= _MAX_TEMPLATE_BYTES else path.read_bytes()).decode("utf-8")
    except OSError as error:
        raise TemplateError(f"the chat template {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TemplateError(f"{path} is not UTF-8") from None


class ChatTemplate:
    """Compiled templates of one model. Safe to use from several threads.

    has_tools: whether there is a place for tools. has_developer: whether that role is known. Raises TemplateError.
    """

    def __init__(self, source: TemplateSource) -> None:
        # takes some 60 ms, which a server of a model without a template does not spend
        from jinja2 import TemplateSyntaxError

        from app.serving.chat_sandbox import ChatEnvironment

        self.ends = source.ends
        self._variables = dict(source.variables or {})
        self._environment: ChatEnvironment = ChatEnvironment()
        try:
            self._templates = {name: self._environment.from_string(text) for name, text in source.texts.items()}
        except (TemplateSyntaxError, RecursionError) as error:
            where = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            raise TemplateError(f"the chat template is not valid: {error}{where}") from None
        if _DEFAULT not in self._templates and len(self._templates) > 1:
            raise TemplateError(f"of {len(self._templates)} chat templates none is named {_DEFAULT!r}")
        self._plain = self._templates.get(_DEFAULT) or next(iter(self._templates.values()))
        self._with_tools = self._templates.get(_WITH_TOOLS, self._plain)
        text = source.texts.get(_WITH_TOOLS) or source.texts.get(_DEFAULT) or next(iter(source.texts.values()))
        self.has_tools = re.search(r"\btools\b", text) is not None
        self.has_developer = any("developer" in text for text in source.texts.values())

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], num_characters: int) -> str:
        """The text of the prompt. ``num_characters``: of all that the client sent, of which the limit depends.

        Blocks for about a second at most. Raises InvalidRequest.
        """
        from app.serving import chat_sandbox

        meter = chat_sandbox.Meter(
            chat_sandbox.MAX_CHARACTERS + CHARACTERS_PER_CHARACTER * num_characters, chat_sandbox.MAX_SECONDS
        )
        given = {**self._variables, **variables, "messages": messages}
        template = self._with_tools if given.get("tools") else self._plain
        try:
            return self._environment.render(template, given, meter)
        except chat_sandbox.TemplateRefusal as refusal:
            told = f"the chat template refuses the conversation: {quote(str(refusal))}"
        except chat_sandbox.RenderLimit as limit:
            told = f"rendering the chat template {limit}"
        except Exception as error:
            if not chat_sandbox.is_template_mistake(error):
                raise
            told = f"the chat template cannot render the conversation ({type(error).__name__})"
        raise InvalidRequest(told, param="messages")
