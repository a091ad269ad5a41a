"""What operators are told: whether it runs, how busy it is, which version."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Health(BaseModel):
    """The answer to a probe."""

    status: Literal["live", "ready"] = Field(description="what was asked for")


class Version(BaseModel):
    """Which server this is."""

    version: str = Field(description="version of the server")


class Load(BaseModel):
    """Live counts."""

    server_load: int = Field(description="the same as `num_open_requests`, under the name that vLLM's clients read")
    phase: str = Field(description="`loading`, `serving` or `draining`")
    ready: bool = Field(description="whether a request sent now would be admitted")
    num_open_requests: int = Field(description="requests for tokens that are being answered")
    num_running: int = Field(description="sequences that run")
    num_waiting: int = Field(description="sequences that wait for a slot")
    num_slots_used: int = Field(description="state slots in use")
    num_slots: int = Field(description="state slots: sequences that can run at once")
    num_engine_restarts: int = Field(description="times the engine was started again")
