"""What the rooms above may ask of an engine, so that they can be tested against a fake one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

from app.engine.request import EngineStats, Event, GenerationRequest, ModelInfo


class EngineError(Exception):
    """Root of what an engine client raises.

    EngineError
      EngineUnavailable   no engine takes requests now: loading, draining or dead
      EngineDied          the engine went away while it held this request
      EngineStartError    the engine cannot start and trying again will not help; the message is for the operator
    """


class EngineUnavailable(EngineError):
    """No engine takes requests now."""


class EngineDied(EngineError):
    """The engine went away while it held this request."""


class EngineStartError(EngineError):
    """The engine cannot start; the message says why, in one line for the operator."""


class EngineStatus(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


class RequestStream(Protocol):
    """The events of one request, in batches: each iteration takes all that have arrived since the last.

    Iteration ends after every sample has finished; raises EngineDied if the engine goes away first. ``aclose`` is
    idempotent and aborts what has not finished.
    """

    def __aiter__(self) -> AsyncIterator[list[Event]]: ...

    async def aclose(self) -> None: ...


class EngineClient(Protocol):
    """A running engine as seen from an event loop."""

    @property
    def status(self) -> EngineStatus: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def num_restarts(self) -> int: ...

    def heartbeat_age(self) -> float:
        """Seconds since the engine last showed that its loop turns."""

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Queue a request. Raises EngineUnavailable."""

    def abort_sample(self, request_id: str, sample: int) -> None:
        """End one sample early, e.g. on a stop string; its TokenEvent with reason ABORT still arrives."""
