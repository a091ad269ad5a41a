"""What goes into the engine and what comes out of it: frozen records of token ids, no text, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an output must be, from its first character to its last.

    ``source`` is empty for "json_object" (any JSON object), the JSON text of a schema for "json_schema", a regular
    expression for "regex", the JSON text of a list of strings for "choice", and for "grammar" the rules themselves,
    as ``root ::= ...`` or in Lark's form.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    source: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of a sequence is drawn. Values are already validated; defaults change nothing.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. ``logprobs`` is None for none, 0 for the sampled
    token only, k for the k likeliest beside it. ``seed`` is always set: whoever builds the request draws one.

    What may not be drawn: the request's stop tokens before ``min_tokens`` tokens were; tokens other than
    ``allowed_token_ids``; the last token of one of the ``bad_words`` where the others, if any, are the end of prompt
    and output; what ``grammar`` does not continue with. Log-probabilities are those of the model all the same.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    min_tokens: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request had come in an engine that died: ``outputs`` has the tokens of each sample, None for one that
    is over. The log-probabilities of prompt tokens up to ``num_scored`` have been told.
    """

    outputs: tuple[tuple[int, ...] | None, ...]
    num_scored: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and the ``n`` continuations wanted of it.

    ``stop_token_ids`` end a sequence, end-of-text included unless the client asked to ignore it. ``max_tokens`` 0
    is allowed together with ``prompt_logprobs``, whose meaning is that of ``SamplingParams.logprobs``. Of the requests
    that wait, those of lower ``priority`` come first, then those that arrived first; none displaces one that runs.
    With ``progress`` each sample goes on behind what it has, of which nothing is told again.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    prompt_logprobs: int | None = None
    priority: int = 0
    progress: Progress | None = None

    @property
    def unfinished(self) -> tuple[int, ...]:
        """The samples that are not over."""
        if self.progress is None:
            return tuple(range(self.n))
        return tuple(sample for sample, output in enumerate(self.progress.outputs) if output is not None)


class FinishReason(StrEnum):
    """Why there is nothing more. INVALID: what the request demands cannot be had, which is the client's to change."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    INVALID = "invalid"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of one token, and of the likeliest tokens in falling order."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


# a tuple: there is one per token, and a frozen dataclass takes three times as long to make
class TokenEvent(NamedTuple):
    """One more token of sample ``sample``, or its end, or both.

    ``token_id`` is None only when a sequence ends without a token: ``max_tokens`` 0, abort, invalid or error. A stop
    token is delivered like any other, with ``stop_reason`` set to its id. ``error`` says what went wrong, without
    paths.
    """

    request_id: str
    sample: int
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobsEvent:
    """Log-probabilities of prompt tokens ``start``, ``start + 1``, ...; those of token 0 do not exist, so start >= 1.

    Slices arrive in order and before the first ``TokenEvent`` of the request.
    """

    request_id: str
    start: int
    logprobs: tuple[TokenLogprobs, ...]


Event = TokenEvent | PromptLogprobsEvent


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rooms above need to know of a loaded model. ``model_dir`` is local, also when a hub id was asked for."""

    model_dir: str
    architecture: str
    num_parameters: int
    vocab_size: int
    num_layers: int
    hidden_size: int
    dtype: str
    state_dtype: str
    device: str
    max_num_seqs: int
    state_bytes_per_seq: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts at one instant, and totals since the engine process started."""

    num_running: int = 0
    num_waiting: int = 0
    num_slots_used: int = 0
    num_slots: int = 0
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    last_step_rows: int = 0
    last_step_prefill_tokens: int = 0
