"""What a request demands of its output, in the words of llguidance: the same for whoever checks and whoever obeys.

The library is imported at the first grammar: nobody else pays for it.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from app.engine.request import Grammar

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# of a source; what it costs is bounded by the limits below, and where they do not help by trying it out first
MAX_SOURCE_BYTES = 64 * 1024
MAX_CHOICES = 5_000

# white space between the parts of a JSON text: enough to indent, and no run without end
_JSON_SPACE = r"[\x20\x0A\x0D\x09]{0,32}"
_ANY_OBJECT = '{"type": "object"}'

_NAMES = {
    "json_object": "the JSON object",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
}

_ASCII_CLASSES = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[0-9A-Za-z_]",
    "W": "[^0-9A-Za-z_]",
    "s": r"[ \t\n\r\f\v]",
    "S": r"[^ \t\n\r\f\v]",
}

_MAX_DETAIL_CHARACTERS = 100
_MAX_NESTING = 200
# what GBNF lets a backslash stand before and the library's converter does not know, and \u, which it gets wrong
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_KNOWN_ESCAPES = '"\\[]nrtx'
# a first rule of Lark's, which the form of ``start ::=`` is not
_LARK = re.compile(r"^\s*(?:%llguidance\b|[?!]?start(?:\.-?\d+)?\s*:(?!:=))", re.MULTILINE)
_CONTINUED_RULE = re.compile(r"(?:[ \t]*(?:#[^\r\n]*)?\r?\n)+[ \t]*\|")


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is for the client."""


def to_lark(grammar: Grammar) -> str:
    """The grammar as llguidance takes it. Raises GrammarError where that can be told without the library's parser."""
    from llguidance import LLMatcher

    check_size(grammar)
    source = grammar.source
    if grammar.kind == "regex":
        if (len(source) - len(source.rstrip("\\"))) % 2:
            raise GrammarError("the regular expression ends in a backslash")
        return LLMatcher.grammar_from_regex(_with_ascii_classes(source))
    if grammar.kind == "choice":
        return _choice_to_lark(source)
    if grammar.kind == "grammar":
        return _rules_to_lark(source)
    schema = _ANY_OBJECT if grammar.kind == "json_object" else source
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _JSON_SPACE})
    except Exception as error:
        raise error_of(grammar, str(error)) from None


def check_size(grammar: Grammar) -> None:
    """Raise GrammarError for a source that is too long to be looked at, or no text."""
    try:
        num_bytes = len(grammar.source.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"{_NAMES[grammar.kind]} holds half of a character (a lone surrogate)") from None
    if num_bytes > MAX_SOURCE_BYTES:
        raise GrammarError(f"{_NAMES[grammar.kind]} is longer than {MAX_SOURCE_BYTES // 1024} KiB")


def limits() -> LLParserLimits:
    """Bounds of what a grammar may cost: when it is compiled, at every token, and in memory."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def error_of(grammar: Grammar, complaint: str) -> GrammarError:
    """What the library says of a grammar, or of an output that it holds to it, in one line for the client."""
    lines = [line for line in complaint.splitlines() if line.strip()] or ["unknown error"]
    # the regex parser draws a picture first
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    detail = " ".join((told or lines)[0].split())
    if detail.startswith("NoExtension"):
        detail = "no text matches it"
    elif "ff_tokens" in detail:
        detail = "the text that it demands has no end, or is too long"
    if len(detail) > _MAX_DETAIL_CHARACTERS:
        detail = detail[: _MAX_DETAIL_CHARACTERS - 3] + "..."
    return GrammarError(f"{_NAMES[grammar.kind]} cannot be used: {detail}")


def _with_ascii_classes(regex: str) -> str:
    """The library takes the digits, letters and spaces of all scripts for \\d, \\w and \\s; JSON schemas do not."""
    return re.sub(r"\\(.)", lambda escape: _ASCII_CLASSES.get(escape[1], escape[0]), regex, flags=re.DOTALL)


def _choice_to_lark(source: str) -> str:
    try:
        choices = json.loads(source)
        # half of a surrogate pair has no bytes
        json.dumps(choices, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise GrammarError("the list of choices is not a JSON list of strings")
    if not choices:
        raise GrammarError("the list of choices is empty")
    if len(choices) > MAX_CHOICES:
        raise GrammarError(f"the list of choices has more than {MAX_CHOICES} entries")
    return "start: " + " | ".join(_quote(choice) for choice in choices)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _rules_to_lark(source: str) -> str:
    from app.engine import gbnf

    if _LARK.search(source):
        return source
    if _depth(source) > _MAX_NESTING:
        raise GrammarError("the grammar is nested too deeply")
    try:
        return gbnf.to_lark(_plain_gbnf(source))
    except Exception as error:
        # the library's parser has errors of its own, and IndexError for what ends too early
        detail = {IndexError: "unexpected end", RecursionError: "it is nested too deeply"}.get(type(error), str(error))
        raise error_of(Grammar("grammar"), detail) from None


def _plain_gbnf(source: str) -> str:
    """Rules on one line each, with no escapes but those that the converter knows."""
    return _CONTINUED_RULE.sub(" |", _ESCAPE.sub(_plain_escape, source))


def _plain_escape(match: re.Match[str]) -> str:
    short, long, character = match.groups()
    if character is not None:
        return match.group() if character in _KNOWN_ESCAPES or ord(character) > 0x7E else f"\\x{ord(character):02x}"
    number = int(short or long, 16)
    if number < 0x80:
        return f"\\x{number:02x}"
    return chr(number) if number <= 0x10FFFF and not 0xD800 <= number < 0xE000 else match.group()


def _depth(source: str) -> int:
    depth = deepest = 0
    for character in source:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest
