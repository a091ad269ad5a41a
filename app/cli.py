"""The command ``mamba-serve``: settings from the command line, then the server; exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app import __version__
from app.engine.early import EarlyProcess
from app.settings import ENV_PREFIX, Settings, SettingsError, flag_name, load

EXIT_USAGE = 2

_DESCRIPTION = "Serve a Mamba language model over HTTP, the way OpenAI's API speaks."
_EPILOG = (
    f"Every setting is also an environment variable ({ENV_PREFIX}PORT for --port) and a key of the YAML file "
    "(port: 8000). Flags win over the environment, that over the file, that over the defaults."
)
_UNTOLD = (PydanticUndefined, None, (), "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def build_parser() -> argparse.ArgumentParser:
    """A parser made from the fields of Settings; it collects strings, the fields judge them."""
    parser = _Parser(
        "mamba-serve", usage="mamba-serve MODEL [options]", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="directory or hub id of the checkpoint")
    parser.add_argument("--version", action="version", version=f"mamba-serve {__version__}")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in Settings.model_fields.items():
        assert isinstance(field.json_schema_extra, dict)
        title = str(field.json_schema_extra["group"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag_name(name), dest=name, default=None, help=_help(field), **_shape(field))
    return parser


def parse(arguments: Sequence[str]) -> Settings:
    """The settings of one start. Raises SettingsError; ``--help`` and ``--version`` leave with SystemExit."""
    given = {key: value for key, value in vars(build_parser().parse_args(arguments)).items() if value is not None}
    model = given.pop("positional_model", None)
    if model is not None and "model" in given:
        raise SettingsError("the model is given twice: as MODEL and as --model")
    if model is not None:
        given["model"] = model
    settings = load(given)
    _check_template(settings.chat_template)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server; the result is the exit code: 0 clean, 1 failed, 2 wrong setting."""
    try:
        settings = parse(sys.argv[1:] if arguments is None else arguments)
    except SettingsError as error:
        print(f"mamba-serve: error: {error}", file=sys.stderr)  # noqa: T201 (the operator's terminal)
        return EXIT_USAGE
    # the engine's libraries take longest to load, so they begin first
    early = EarlyProcess()
    try:
        # imported late: a wrong setting is told before the server's libraries load
        from app.main import run

        return run(settings, early=early)
    finally:
        early.discard()


def _check_template(name: str | None) -> None:
    """Raises SettingsError for a file that holds no template that can be used."""
    if name is None:
        return
    from app.serving.chat_template import BUILT_IN, TemplateError, load_template

    try:
        if name not in BUILT_IN:
            load_template(name)
    except TemplateError as error:
        raise SettingsError(f"--chat-template: {error}") from None


def _help(field: FieldInfo) -> str:
    description = (field.description or "").replace("%", "%%")
    if field.default in _UNTOLD or field.default is False or "default" in description:
        return description
    return f"{description} (default: {shown_default(field)})"


def shown_default(field: FieldInfo) -> str:
    """A default as an operator would write it."""
    if isinstance(field.default, ByteSize):
        return field.default.human_readable()
    return " ".join(field.default) if isinstance(field.default, tuple) else str(field.default)


def _shape(field: FieldInfo) -> dict[str, Any]:
    """How a flag looks on the command line: a switch, a list, one of a few words, or one value."""
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(field.annotation) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "VALUE"}
    if get_origin(field.annotation) is Literal:
        return {"choices": get_args(field.annotation)}
    return {"metavar": "VALUE"}


if __name__ == "__main__":
    sys.exit(main())
