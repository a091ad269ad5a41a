"""The one body of every answer that is not a result."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """What went wrong, for people and for programs."""

    message: str = Field(description="what is wrong and what to do, with at most 100 characters of the input")
    type: str = Field(description="class of the error, such as `invalid_request_error`")
    param: str | None = Field(default=None, description="the field at fault")
    code: str | None = Field(default=None, description="a word for programs, such as `context_length_exceeded`")


class ErrorBody(BaseModel):
    """OpenAI's envelope around an error."""

    error: ErrorDetail = Field(description="what went wrong")
