"""The runner of a CUDA device: graphs where there can be, and everything addressed by slot."""

from __future__ import annotations

from functools import partial

from app.engine.capture import Capturer
from app.engine.chunk_graphs import ChunkGraphs, default_shapes
from app.engine.fused_sampler import SlotSampling, draw_tokens
from app.engine.graphs import GraphSteps, Steps
from app.engine.runner import Runner
from app.engine.slot_decoder import SlotDecoder
from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaForCausalLM
from mamba_core.staggered import Staggered


def cuda_runner(
    model: MambaForCausalLM,
    cache: MambaCache,
    vocab_size: int,
    *,
    cuda_graphs: bool = True,
    prefill_budget: int = 8192,
) -> Runner:
    """A runner for a cache on a CUDA device. Without graphs, each operation is launched on its own."""
    tables = SlotSampling(cache.num_slots, cache.device)
    if not cuda_graphs:
        return Runner(model, cache, vocab_size, SlotDecoder(model, cache, vocab_size, tables, draw_tokens, Steps))
    make_steps = partial(GraphSteps, capturer=Capturer(cache.device))
    decoder = SlotDecoder(model, cache, vocab_size, tables, draw_tokens, make_steps)
    # a capturer of its own, so that a prefill that cannot be captured does not keep steps from being
    shapes = default_shapes(prefill_budget)
    return Runner(
        model, cache, vocab_size, decoder, ChunkGraphs(Staggered(model), cache, Capturer(cache.device), shapes)
    )
