"""A model whose logits are known, so that an engine's tokens can be told in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from app.engine.engine import Engine
from app.engine.request import Event, FinishReason, GenerationRequest, PromptLogprobsEvent, SamplingParams, TokenEvent
from app.engine.runner import Runner
from app.engine.sequence import StepPlan
from mamba_core import MambaCache
from mamba_core.ops import Packing

VOCAB_SIZE = 53
_MODULUS = 9973


def advance(state: int, token: int) -> int:
    """The state after one more token. It depends on every token before, and 0 is the fresh one."""
    return (state * 31 + token + 7) % _MODULUS


def state_after(tokens: Iterable[int]) -> int:
    state = 0
    for token in tokens:
        state = advance(state, token)
    return state


def logits_of(state: int) -> Tensor:
    """[V]: the likeliest token is the state modulo V, the others fall off from there."""
    return -0.5 * ((torch.arange(VOCAB_SIZE) - state) % VOCAB_SIZE).float()


def greedy(prompt: Iterable[int], count: int) -> list[int]:
    """The greedy continuation of a prompt."""
    tokens = list(prompt)
    start = len(tokens)
    for _ in range(count):
        tokens.append(state_after(tokens) % VOCAB_SIZE)
    return tokens[start:]


class HistoryModel:
    """Keeps in ``ssm`` a number that depends on all tokens of the slot; hidden [T, 1] is that number."""

    def forward_packed(self, input_ids: Tensor, packing: Packing, cache: MambaCache) -> Tensor:
        bounds = packing.cu_seqlens.tolist()
        hidden = torch.empty(packing.num_tokens, 1)
        for row, slot in enumerate(packing.slots.tolist()):
            state = cache.ssm[0, slot, 0, 0].item()
            for index in range(bounds[row], bounds[row + 1]):
                token = int(input_ids[index])
                state = state if state != state else advance(int(state), token)
                hidden[index] = state
            cache.ssm[0, slot, 0, 0] = state
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        rows = [logits_of(int(x)) if x == x else torch.full((VOCAB_SIZE,), torch.nan) for x in hidden[:, 0].tolist()]
        return torch.stack(rows)


def make_cache(num_slots: int) -> MambaCache:
    """A cache of ``num_slots`` slots and the scratch slot, full of NaN, so that whatever is read unwritten shows."""
    shape = (1, num_slots + 1, 1, 1)
    return MambaCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan))


def make_engine(
    num_slots: int = 4,
    prefill_budget: int = 8,
    before_step: Callable[[StepPlan, MambaCache], None] | None = None,
) -> Engine:
    cache = make_cache(num_slots)
    return Engine(
        Runner(HistoryModel(), cache, VOCAB_SIZE),
        num_slots=num_slots,
        vocab_size=VOCAB_SIZE,
        prefill_budget=prefill_budget,
        before_step=(lambda plan: before_step(plan, cache)) if before_step else None,
    )


def make_request(
    request_id: str = "r",
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 4,
    *,
    n: int = 1,
    stop: Sequence[int] = (),
    prompt_logprobs: int | None = None,
    temperature: float = 0.0,
    **sampling: object,
) -> GenerationRequest:
    params = SamplingParams(temperature=temperature, **sampling)  # type: ignore[arg-type]
    return GenerationRequest(request_id, tuple(prompt), params, max_tokens, tuple(stop), n, prompt_logprobs)


class Transcript:
    """Events sorted by request and sample."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], TokenEvent] = {}
        self.events: dict[tuple[str, int], list[TokenEvent]] = {}
        self.prompt_slices: dict[str, list[PromptLogprobsEvent]] = {}

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, PromptLogprobsEvent):
                assert (event.request_id, 0) not in self.tokens, "prompt log-probabilities after a token"
                self.prompt_slices.setdefault(event.request_id, []).append(event)
                continue
            key = (event.request_id, event.sample)
            assert key not in self.ends, "an event after the end"
            self.events.setdefault(key, []).append(event)
            if event.token_id is not None:
                self.tokens.setdefault(key, []).append(event.token_id)
            if event.finish_reason is not None:
                self.ends[key] = event

    def reason(self, request_id: str, sample: int = 0) -> FinishReason | None:
        return self.ends[request_id, sample].finish_reason


def run(engine: Engine, *requests: GenerationRequest) -> Transcript:
    """Submit, step until nothing is left, and check the books after every step."""
    for request in requests:
        engine.submit(request)
    transcript = Transcript()
    while engine.has_work:
        transcript.add(engine.step())
        engine.check_integrity()
    return transcript
