"""A model whose logits are known, so that an engine's tokens can be told in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.engine import distribution
from app.engine.chunk_graphs import ChunkGraphs, Shape
from app.engine.decoder import BROKEN, Model
from app.engine.engine import Engine
from app.engine.graphs import GraphSteps
from app.engine.request import (
    Event,
    FinishReason,
    GenerationRequest,
    Progress,
    PromptLogprobsEvent,
    SamplingParams,
    TokenEvent,
)
from app.engine.runner import Runner
from app.engine.sampler import GREEDY_TEMPERATURE
from app.engine.sequence import StepPlan
from app.engine.slot_decoder import SlotDecoder
from app.engine.states import States
from mamba_core import MambaCache
from mamba_core.ops import Packing
from mamba_core.ops.lag import BEHIND, WRITTEN, Lag

VOCAB_SIZE = 53
CHUNK_SHAPES = (*(Shape(size, size, 1) for size in (4, 8, 32, 128)), Shape(8, 8, 2), Shape(32, 16, 8))
LARGEST_THAT_DOES_NOT_LAG = 2
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

    def forward_packed(
        self, input_ids: Tensor, packing: Packing, cache: MambaCache, wanted: Tensor | None = None
    ) -> Tensor:
        bounds = packing.cu_seqlens.tolist()
        hidden = torch.empty(packing.num_tokens, 1)
        for row, slot in enumerate(packing.slots.tolist()):
            state = cache.ssm[0, slot, 0, 0].item()
            for index in range(bounds[row], bounds[row + 1]):
                token = int(input_ids[index])
                state = state if state != state else advance(int(state), token)
                hidden[index] = state
            cache.ssm[0, slot, 0, 0] = state
        return hidden if wanted is None else hidden[wanted]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        rows = [logits_of(int(x)) if x == x else torch.full((VOCAB_SIZE,), torch.nan) for x in hidden[:, 0].tolist()]
        return torch.stack(rows)


def make_cache(num_slots: int) -> MambaCache:
    """A cache of ``num_slots`` slots and the scratch slot, full of NaN, so that whatever is read unwritten shows."""
    shape = (1, num_slots + 1, 1, 1)
    return MambaCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan))


class OverlappedRunner(Runner):
    """On a CPU a launch returns when all is done; this one says so only when it is asked a step later."""

    is_asynchronous = True


class HostTables:
    """``fused_sampler.SlotSampling``, on any device and without kernels."""

    def __init__(self, num_slots: int) -> None:
        self.temperature, self.top_p, self.min_p = (torch.zeros(num_slots) for _ in range(3))
        self.top_k, self.keys = (torch.zeros(num_slots, dtype=torch.int64) for _ in range(2))
        self.positions, self.last_tokens = torch.zeros_like(self.keys), torch.zeros_like(self.keys)

    def write(
        self,
        slots: Sequence[int],
        params: Sequence[SamplingParams],
        keys: Sequence[int],
        positions: Sequence[int],
        last_tokens: Sequence[int],
    ) -> None:
        self.last_tokens[list(slots)] = torch.tensor(last_tokens, dtype=torch.int64)
        for slot, p, key, position in zip(slots, params, keys, positions, strict=True):
            self.temperature[slot], self.top_p[slot], self.min_p[slot] = p.temperature, p.top_p, p.min_p
            self.top_k[slot], self.keys[slot], self.positions[slot] = p.top_k, key, position


def draw_on_host(logits: Tensor, slots: Tensor, tables: HostTables, out: Tensor | None = None) -> Tensor:
    """``fused_sampler.draw_tokens``, likewise."""
    is_finite = logits.sum(-1).isfinite()
    temperature = tables.temperature[slots]
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=GREEDY_TEMPERATURE)[:, None]
    scaled = torch.where(is_finite[:, None], scaled, 0.0)
    weights = scaled.exp()
    top_k, top_p = tables.top_k[slots].clamp(max=logits.shape[1]), tables.top_p[slots]
    thresholds = distribution.filter_thresholds(scaled, weights, top_k, top_p, logits.shape[1])
    thresholds = torch.maximum(thresholds, tables.min_p[slots].log())
    uniforms = distribution.uniforms(tables.keys[slots], tables.positions[slots])
    drawn = distribution.invert(weights.masked_fill(scaled < thresholds[:, None], 0), uniforms)
    tables.positions[slots] += 1
    tokens = torch.where(temperature < GREEDY_TEMPERATURE, logits.argmax(-1), drawn)
    tables.last_tokens[slots] = tokens
    told = torch.where(is_finite, tokens, BROKEN)
    return told if out is None else out.copy_(told)


class Replay:
    """Stands for a CUDA graph and for what its function returned: runs the function anew."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self._body = body
        self.output: Any = None

    @property
    def graph(self) -> Replay:
        return self

    def replay(self) -> None:
        self.output = self._body()


class HostCapturer:
    """``capture.Capturer`` for any device."""

    def __init__(self) -> None:
        self.can_capture = True
        self.names: list[str] = []

    def capture(self, name: str, warm_up: Callable[[], object], body: Callable[[], Any]) -> Any:
        self.names.append(name)
        warm_up()
        return Replay(body)

    @staticmethod
    def borrow(tensor: Tensor) -> Tensor:
        return tensor


class BrokenCapturer(HostCapturer):
    """Fails from the n-th capture on."""

    def __init__(self, num_good: int) -> None:
        super().__init__()
        self._num_good = num_good

    def capture(self, name: str, warm_up: Any, body: Any) -> Any:
        if len(self.names) >= self._num_good:
            self.can_capture = False
            return None
        return super().capture(name, warm_up, body)


class LaggingModel:
    """Steps of several rows leave every second token to the next step, as a GPU's do; ``states.Settler`` as well.

    Raises AssertionError when the states of a sequence lack a token where they must not.
    """

    def __init__(self, model: Model, cache: MambaCache) -> None:
        layers, slots = cache.ssm.shape[:2]
        self._model = model
        self._lag = cache.lag = Lag.zeros(layers, slots, 1, 1, dtype=torch.float32, device="cpu")
        self._cache = cache
        self.num_settled = 0

    def lags(self, num_rows: int) -> bool:
        return num_rows > LARGEST_THAT_DOES_NOT_LAG

    def settle(self, slots: Tensor) -> None:
        assert slots.unique().numel() == slots.numel()
        self.num_settled += len(slots)
        behind = slots[self._lag.phases[slots] == BEHIND]
        if len(behind):
            self._model.forward_packed(self._lag.b[0, behind, 0].long(), Packing.step(behind), self._cache)
            self._lag.phases[behind] = 0

    def forward_packed(
        self, input_ids: Tensor, packing: Packing, cache: MambaCache, wanted: Tensor | None = None
    ) -> Tensor:
        slots = packing.slots
        phases = self._lag.phases[slots]
        if not (packing.is_step and packing.may_lag and self.lags(packing.num_rows)):
            assert not (phases[slots != 0] == BEHIND).any()
            return self._model.forward_packed(input_ids, packing, cache, wanted)
        self.settle(slots[phases == BEHIND].unique())
        is_left = (phases == WRITTEN) | ((phases == 0) & (slots % 2 == 0))
        left = slots[is_left]
        before = [state[:, left].clone() for state in (cache.conv, cache.ssm)]
        hidden = self._model.forward_packed(input_ids, packing, cache)
        for state, values in zip((cache.conv, cache.ssm), before, strict=True):
            state[:, left] = values
        self._lag.b[0, left, 0] = input_ids[is_left].float()
        self._lag.phases[slots] = torch.where(is_left, BEHIND, WRITTEN).int()
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._model.compute_logits(hidden)


def graph_runner(
    model: Model, cache: MambaCache, vocab_size: int, capturer: Any = None, states: States | None = None
) -> Runner:
    """The runner of a GPU, on a CPU."""
    capturer = capturer or HostCapturer()
    make_steps = partial(GraphSteps, capturer=capturer)
    decoder = SlotDecoder(model, cache, vocab_size, HostTables(cache.num_slots), draw_on_host, make_steps, states)
    chunk_graphs = ChunkGraphs(model, cache, capturer, CHUNK_SHAPES)
    return OverlappedRunner(model, cache, vocab_size, decoder, chunk_graphs, states=states)


def make_runner(mode: str, model: Model, cache: MambaCache, vocab_size: int) -> Runner:
    """A runner that is "synchronous" or "overlapped", or overlapped with everything that a GPU has ("graphs"), also
    with states that may lack a token ("lagging"), or synchronous with the ways that a CPU has ("uniform").
    """
    if mode == "uniform":
        return Runner(model, cache, vocab_size, is_uniform=True)
    if mode in WITH_GRAPHS:
        states = None
        if mode == "lagging":
            model = LaggingModel(model, cache)
            states = States(cache, model)
        runner = graph_runner(model, cache, vocab_size, states=states)
        runner.start()
        while runner.prepare_more():
            pass
        return runner
    return (Runner if mode == "synchronous" else OverlappedRunner)(model, cache, vocab_size)


WITH_GRAPHS = ("graphs", "lagging")
MODES = ("synchronous", "overlapped", *WITH_GRAPHS)


def make_engine(
    num_slots: int = 4,
    prefill_budget: int = 8,
    before_step: Callable[[StepPlan, MambaCache], None] | None = None,
    mode: str = "synchronous",
) -> Engine:
    cache = make_cache(num_slots)
    return Engine(
        make_runner(mode, HistoryModel(), cache, VOCAB_SIZE),
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
    progress: Progress | None = None,
    **sampling: object,
) -> GenerationRequest:
    params = SamplingParams(temperature=temperature, **sampling)  # type: ignore[arg-type]
    return GenerationRequest(
        request_id, tuple(prompt), params, max_tokens, tuple(stop), n, prompt_logprobs, progress=progress
    )


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


def taken_up(request: GenerationRequest, transcript: Transcript) -> GenerationRequest | None:
    """What a new engine is asked after one that died had told so much; None if that was all."""
    name = request.request_id
    outputs = [
        None if (name, sample) in transcript.ends else tuple(transcript.tokens.get((name, sample), ()))
        for sample in range(request.n)
    ]
    if set(outputs) == {None}:
        return None
    last = transcript.prompt_slices.get(name, [])[-1:]
    num_scored = sum(piece.start + len(piece.logprobs) - 1 for piece in last)
    return replace(request, progress=Progress(tuple(outputs), num_scored))


def run(engine: Engine, *requests: GenerationRequest) -> Transcript:
    """Submit, step until nothing is left, and check the books after every step."""
    for request in requests:
        engine.submit(request)
    transcript = Transcript()
    while engine.has_work:
        transcript.add(engine.step())
        engine.check_integrity()
    return transcript
