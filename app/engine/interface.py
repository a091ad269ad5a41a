"""What the rooms above may ask of an engine, so that they can be tested against a fake one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class SampleSink(Protocol):
    """Where what comes of one sample goes, in order. Called on the event loop for every token: must neither block nor
    raise."""

    def on_token(self, token_id: int) -> None:
        """One more token and nothing else: no log-probabilities, no end."""

    def on_event(self, event: Event) -> None:
        """Anything else. After a ``TokenEvent`` with a finish reason nothing follows."""

    def on_lost(self, error: EngineError) -> None:
        """The engine went away; nothing follows."""


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

    @property
    def num_resumed(self) -> int:
        """Requests that went on after the engine was started again."""

    def watch_queue(self, observer: Callable[[float], None]) -> None:
        """Have ``observer`` told the seconds that each request was in the queue, once it has left it for a slot."""

    def heartbeat_age(self) -> float:
        """Seconds since the engine last showed that its loop turns."""

    def submit(self, request: GenerationRequest, sinks: Sequence[SampleSink]) -> None:
        """Queue a request, with a sink for each of its ``n`` samples. No sink is called before this has returned.

        Raises EngineUnavailable.
        """

    def abort_sample(self, request_id: str, sample: int) -> None:
        """End one sample early, e.g. on a stop string; its TokenEvent with reason ABORT still arrives."""

    def abandon(self, request_id: str) -> None:
        """End all of a request; its sinks are not called any more. What is not live is ignored."""
