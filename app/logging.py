"""Log lines for people or for machines, each with the id of the request that it belongs to."""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

import orjson

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_notes: ContextVar[dict[str, Any] | None] = ContextVar("notes", default=None)

# what every record has; anything else was given as ``extra`` and belongs into the line
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def bind_request(request_id: str) -> dict[str, Any]:
    """Put an id on all log lines of the current task and of those it starts; returns where ``note`` writes."""
    notes: dict[str, Any] = {}
    _request_id.set(request_id)
    _notes.set(notes)
    return notes


def current_request_id() -> str:
    """The id that ``bind_request`` gave to the current task."""
    return _request_id.get() or ""


def current_notes() -> dict[str, Any]:
    """What the line will hold that tells of the current request when it is over; may be added to from any task."""
    notes = _notes.get()
    return {} if notes is None else notes


def note(**values: Any) -> None:
    """Add values to the line that will tell of the current request when it is over."""
    current_notes().update(values)


def configure(log_format: str, level: str, uvicorn_level: str) -> None:
    """Send all log lines to stderr in the given format; replaces what was configured before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("app").setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"
    logging.getLogger("uvicorn").setLevel(uvicorn_level.upper())
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, logger, message, request_id, extras, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class ConsoleFormatter(logging.Formatter):
    """Time, level, message and extras; control characters escaped, so that no input can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        extras = " ".join(f"{key}={_printable(str(value))}" for key, value in _extras(record).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname:<7} {_printable(record.getMessage())} {extras}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _timestamp(seconds: float) -> str:
    milliseconds = int(seconds * 1000) % 1000
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{milliseconds:03d}Z"


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    extras = {key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS and value is not None}
    request_id = _request_id.get()
    if request_id is not None:
        extras.setdefault("request_id", request_id)
    return extras


def _printable(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
