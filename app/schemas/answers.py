"""What the answers of completions and of chats have in common."""

from __future__ import annotations

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int = Field(description="prompt tokens that did not have to be computed")


class Usage(BaseModel):
    """Token counts; each prompt counts once, whatever `n`."""

    prompt_tokens: int = Field(description="tokens of all prompts")
    completion_tokens: int = Field(description="tokens generated, over all choices")
    total_tokens: int = Field(description="the sum of both")
    prompt_tokens_details: PromptTokensDetails = Field(description="where prompt tokens came from")


class AnswerHead(BaseModel):
    """What an answer tells of itself."""

    created: int = Field(description="when the request came, in seconds since 1970")
    model: str = Field(description="the name that was asked for, or the first one")
    system_fingerprint: str = Field(description="changes when the same seed may give other tokens")
    usage: Usage | None = Field(default=None, description="token counts; in a stream null unless asked for")


class PromptLogprob(BaseModel):
    """What a token was worth at a place of the prompt."""

    logprob: float = Field(description="natural logarithm")
    rank: int | None = Field(description="1 for the likeliest; null for a prompt token that is not among the asked for")
    decoded_token: str = Field(description="the token's text; `bytes:` and escapes for a part of a character")


class PromptTold(BaseModel):
    """What is told of a prompt, if asked for."""

    prompt_token_ids: list[int] | None = Field(
        default=None, description="with `return_token_ids`: of the prompt; in a stream in each choice's first chunk"
    )
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        default=None,
        description="with the field of this name: for each prompt token itself and the likeliest, by their ids; "
        "null for the first",
    )


class ChoiceEnd(BaseModel):
    """What ended a choice, and what it was made of."""

    stop_reason: int | str | None = Field(
        default=None, description="the client's stop string or token id; null for the model's own end"
    )
    token_ids: list[int] | None = Field(
        default=None, description="with `return_token_ids`: of what was generated, its stop token included"
    )
