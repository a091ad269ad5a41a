"""Chat templates in a jar: Jinja's immutable sandbox, with a meter on everything that can take long or grow.

A template is the operator's, but what runs through it is any client's. So each rendering has a meter of time and of
characters, and the template's syntax tree is rewritten so that each step that can repeat or grow goes past the meter:
every turn of a loop, every call, every value that is written, added, multiplied or joined. No single step in between
is longer than the limits allow, which is why no thread has to be killed.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, Undefined, nodes, pass_context, pass_environment
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 1.0
MAX_CHARACTERS = 2**20
MAX_ITEMS = 2**16
MAX_WIDTH = 1024
MAX_BITS = 256

_HANDS = 16
_COUNTED = "_counted"
_JOINED = "_joined"
_BUILT = "_built"
# what pads a text to a width that is given
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDTH = re.compile(r"\d{4,}|\*|\{[^{}]*\{")
# filters that grow what they get, or need what no conversation has
_BANNED_FILTERS = frozenset(
    ("attr", "batch", "center", "filesizeformat", "pprint", "random", "slice", "striptags", "urlize", "wordwrap")
) | {"xmlattr"}
_OPERATORS = frozenset({"+", "*", "**", "%", "-", "//"})


class RenderLimit(Exception):
    """A rendering took too long or grew too large."""


class TemplateRefusal(Exception):
    """The template itself refuses the conversation; the message is its author's."""


class Meter:
    """What one rendering may still take: seconds of wall time, and characters made on the way."""

    __slots__ = ("_deadline", "_num_left", "_num_written", "max_characters")

    def __init__(self, max_characters: int, max_seconds: float) -> None:
        self._deadline = time.monotonic() + max_seconds
        self.max_characters = max_characters
        # what passes through many hands is counted at each
        self._num_written = 0
        self._num_left = _HANDS * max_characters

    def tick(self) -> None:
        """One step more."""
        if time.monotonic() > self._deadline:
            raise RenderLimit("took too long")

    def write(self, num_characters: int) -> None:
        """So many characters become a part of the text."""
        self._num_written += num_characters
        if self._num_written > self.max_characters:
            raise RenderLimit("grew too large")
        self.tick()

    def take(self, num_characters: int) -> None:
        """Something of that many characters or items is made."""
        self._num_left -= num_characters
        if num_characters > self.max_characters or self._num_left < 0:
            raise RenderLimit("grew too large")
        self.tick()


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What templates of checkpoints are written for: the dialect of transformers' chat templates.

    Safe to use from several threads; each renders within ``metered``.
    """

    intercepted_binops = _OPERATORS

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _GenerationTag],
            # folding would work out at compile time what is to be metered
            optimized=False,
            finalize=_count_output,
        )
        self.meters = threading.local()
        for name in _BANNED_FILTERS:
            self.filters.pop(name, None)
        for name, function in self.filters.items():
            self.filters[name] = self._metered_filter(name, function)
        self.filters |= {"tojson": _tojson, _COUNTED: _counted, _JOINED: _joined, _BUILT: _built}
        self.globals.pop("lipsum")
        self.globals |= {"range": self._range, "raise_exception": _refuse, "strftime_now": _strftime_now}

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` as the sandbox allows it, metered."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def format_text(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [args, kwargs], self.meter)
            return wrapped(*args, **kwargs)

        return format_text

    @property
    def meter(self) -> Meter:
        """That of the rendering in this thread."""
        meter: Meter = self.meters.current
        return meter

    def render(self, template: Any, variables: dict[str, Any], meter: Meter) -> str:
        """The text. Raises RenderLimit, TemplateRefusal, and whatever a template's mistake raises."""
        self.meters.current = meter
        try:
            return "".join(template.generate(variables))
        finally:
            del self.meters.current

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right, self.meter)
        result = super().call_binop(context, operator, left, right)
        weigh(result, self.meter)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        meter.tick()
        target = getattr(__obj, "__self__", None)
        if isinstance(target, str):
            _check_method(target, getattr(__obj, "__name__", ""), args, kwargs, meter)
        result = super().call(__context, __obj, *args, **kwargs)
        weigh(result, meter)
        return result

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > MAX_ITEMS:
            raise RenderLimit("grew too large")
        return numbers

    def _metered_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter with a look at what it is given before, and at what it made after."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            # Jinja puts itself or its context first where a filter wants it
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            _check_filter(name, given, kwargs, self.meter)
            result = function(*args, **kwargs)
            weigh(result, self.meter)
            return result

        if hasattr(function, "jinja_pass_arg"):
            metered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return metered


class _GenerationTag(Extension):
    """``{% generation %}``: marks for training what the assistant says. Here it is what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Leads loops and joined texts past the meter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, _JOINED, [], [], None, None, lineno=node.lineno)

    def _visit_literal(self, node: nodes.Literal) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return nodes.Filter(node, _BUILT, [], [], None, None, lineno=node.lineno)

    visit_List = visit_Dict = visit_Tuple = _visit_literal


class _Counted:
    """An iterable whose every item is a tick, and whose length is told where it has one."""

    def __init__(self, items: Any, meter: Meter) -> None:
        self._items = items
        self._meter = meter

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._meter.tick()
            yield item


@pass_environment
def _counted(environment: ChatEnvironment, items: Any) -> _Counted:
    return _Counted(items, environment.meter)


@pass_environment
def _built(environment: ChatEnvironment, value: Any) -> Any:
    weigh(value, environment.meter)
    return value


@pass_environment
def _joined(environment: ChatEnvironment, items: list[Any]) -> str:
    texts = [_text(item, environment.meter) for item in items]
    environment.meter.take(sum(map(len, texts)))
    return "".join(texts)


# with the context, so that nothing of it is done when a template is compiled
@pass_context
def _count_output(context: Context, value: Any) -> str:
    meter: Meter = context.environment.meter  # type: ignore[attr-defined]
    text = _text(value, meter)
    meter.write(len(text))
    return text


def weigh(value: Any, meter: Meter, *, is_written: bool = False) -> None:
    """Count all items that a value holds, at every place where they stand: twenty lists within each other may hold
    millions.

    is_written: it is about to become text, so that its characters count, and nothing may be in it whose inside is not
    seen here.
    """
    if isinstance(value, str):
        meter.take(len(value))
        return
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if is_written:
                meter.take(len(item))
        elif isinstance(item, list | tuple):
            meter.take(len(item))
            waiting += item
        elif isinstance(item, dict):
            meter.take(len(item))
            waiting += item.keys()
            waiting += item.values()
        elif is_written and not (item is None or isinstance(item, int | float | Undefined)):
            raise TypeError(f"{type(item).__name__} is no text")


def _text(value: Any, meter: Meter) -> str:
    if isinstance(value, str):
        return value
    weigh(value, meter, is_written=True)
    return str(value)


@pass_environment
def _tojson(
    environment: ChatEnvironment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it for templates: not escaped for HTML."""
    if indent is not None and indent > 8:
        raise RenderLimit("grew too large")
    weigh(value, environment.meter, is_written=True)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    environment.meter.take(len(text))
    return text


def _refuse(message: object) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 256 or _WIDTH.search(form):
        raise RenderLimit("grew too large")
    return datetime.now().strftime(form)


def _check_operands(operator: str, left: Any, right: Any, meter: Meter) -> None:
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise RenderLimit("grew too large")
    elif operator == "*":
        text, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(text, str | list | tuple) and isinstance(times, int):
            meter.take(len(text) * max(0, times))
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        meter.take(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right, meter)


def _check_format(text: str, values: Any, meter: Meter) -> None:
    if _WIDTH.search(text):
        raise RenderLimit("grew too large")
    weigh(values, meter, is_written=True)


def _check_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], meter: Meter) -> None:
    """Methods of texts that may make much of little."""
    if name in _PADDING_METHODS:
        widths = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        if any(width > MAX_WIDTH for width in widths):
            raise RenderLimit("grew too large")
        # a tab may become as many spaces as the width says
        meter.take(len(text) * (1 + max(0, *widths, 8)) if name == "expandtabs" else len(text))
    elif name == "replace":
        _check_replace(text, args, meter)
    elif name == "join" and args:
        _check_join(args[0], text, meter)


def _check_filter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], meter: Meter) -> None:
    rest = (*args[1:], *kwargs.values())
    if name in (
        "string",
        "format",
        "join",
        "replace",
        "indent",
        "map",
        "upper",
        "lower",
        "title",
        "capitalize",
        "trim",
    ):
        # these make text of whatever they get
        weigh(list(rest), meter, is_written=True)
    if name == "format":
        _check_format(_text(args[0], meter), rest, meter)
    elif name == "indent":
        width = max((len(value) if isinstance(value, str) else int(value) for value in rest), default=4)
        if width > MAX_WIDTH:
            raise RenderLimit("grew too large")
        text = _text(args[0], meter)
        meter.take(len(text) + text.count("\n") * width)
    elif name == "replace":
        _check_replace(_text(args[0], meter), rest, meter)
    elif name == "join":
        _check_join(args[0], _text(rest[0], meter) if rest else "", meter)
    elif name in ("string", "upper", "lower", "title", "capitalize", "trim"):
        _text(args[0], meter)


def _check_replace(text: str, args: tuple[Any, ...], meter: Meter) -> None:
    if len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        meter.take(len(text) + text.count(old) * len(new))


def _check_join(items: Any, separator: str, meter: Meter) -> None:
    if isinstance(items, str | list | tuple | dict):
        meter.take(len(items) * (1 + len(separator)))
        weigh(items, meter, is_written=True)


def is_template_mistake(error: Exception) -> bool:
    """Whether a template raised this for what is in it or in its variables, and not for our own mistake."""
    kinds = (
        TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    )
    return isinstance(error, kinds)
