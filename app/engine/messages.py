"""What the two processes say to each other: msgspec structs in msgpack, one message each way per step.

A request is named by a number, its key, which the client gives, and sample k of it by key + k. Ordinary tokens travel
as two columns; only events that carry more than a token travel one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from app.engine.config import EngineConfig
from app.engine.request import (
    EngineStats,
    Event,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PromptLogprobsEvent,
    TokenEvent,
    TokenLogprobs,
)

# exit status of a process that has sent StartFailed
EXIT_START_FAILED = 3


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the parent hands over on the command line, as one JSON object."""

    endpoint: str
    parent_pid: int
    config: EngineConfig

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Arguments:
        return msgspec.json.decode(text, type=cls)


class Submit(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Queue a request under a key, which with the ``n - 1`` numbers after it belongs to no other."""

    key: int
    request: GenerationRequest


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """End one sample of a request, or all."""

    request_id: str
    sample: int | None


class Stop(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """End the process after the step under way."""


Command = Submit | Abort | Stop


class RichToken(msgspec.Struct, array_like=True, frozen=True):
    """A ``TokenEvent`` that is more than a token."""

    key: int
    sample: int
    token_id: int | None
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | None
    error: str | None


class PromptSlice(msgspec.Struct, array_like=True, frozen=True):
    """A ``PromptLogprobsEvent``."""

    key: int
    start: int
    logprobs: tuple[TokenLogprobs, ...]


class Beat(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The process lives: it loads, or it has nothing to do."""

    stats: EngineStats | None = None


class Checked(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The checkpoint has been found and looks loadable; loading begins."""

    model_dir: str


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The model is loaded and has made its first step."""

    info: ModelInfo
    stats: EngineStats


class StartFailed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine cannot start; one line for the operator. The process ends."""

    message: str


class StepReport(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The events of one step: prompt slices come first, then ordinary tokens, then what is more than a token.

    ``tokens[i]`` is the next ordinary token of the sample that ``samples[i]`` names; a sample has several where a
    grammar forces them. ``waits`` are the seconds that requests which the step took up had been in the queue.
    """

    stats: EngineStats
    prompt_slices: list[PromptSlice]
    rich: list[RichToken]
    samples: list[int]
    tokens: list[int]
    waits: list[float] = []


Report = Beat | Checked | Ready | StartFailed | StepReport


def pack_events(
    events: Iterable[Event], keys: Mapping[str, int], stats: EngineStats, waits: Iterable[float] = ()
) -> StepReport:
    """The report of one step. ``keys`` gives each request id its key."""
    report = StepReport(stats, [], [], [], [], list(waits))
    for event in events:
        key = keys[event.request_id]
        if isinstance(event, PromptLogprobsEvent):
            report.prompt_slices.append(PromptSlice(key, event.start, event.logprobs))
        elif event.finish_reason is None and event.logprobs is None and event.token_id is not None:
            report.samples.append(key + event.sample)
            report.tokens.append(event.token_id)
        else:
            report.rich.append(_rich_token(key, event))
    return report


def unpack_rich(request_id: str, rich: RichToken) -> TokenEvent:
    """The event that a rich token stands for."""
    return TokenEvent(
        request_id, rich.sample, rich.token_id, rich.logprobs, rich.finish_reason, rich.stop_reason, rich.error
    )


def _rich_token(key: int, event: TokenEvent) -> RichToken:
    return RichToken(
        key, event.sample, event.token_id, event.logprobs, event.finish_reason, event.stop_reason, event.error
    )
