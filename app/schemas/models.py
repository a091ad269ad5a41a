"""`GET /v1/models`: what is served."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """One name under which the model is served."""

    id: str = Field(description="name that requests may use as `model`")
    object: Literal["model"] = Field(default="model", description="what this is")
    created: int = Field(description="when this server was started, in seconds since 1970")
    owned_by: str = Field(default="mamba-serve", description="who serves it")
    root: str | None = Field(default=None, description="the first name of the same model, where there are several")
    max_model_len: int | None = Field(default=None, description="most tokens of prompt plus output; null for no limit")
    state_bytes_per_sequence: int = Field(description="memory that one running sequence takes, whatever its length")


class ModelList(BaseModel):
    """All names."""

    object: Literal["list"] = Field(default="list", description="what this is")
    data: list[ModelCard] = Field(description="one for each name, the main one first")
