"""The runner of a CUDA device: graphs where there can be, and everything addressed by slot."""

from __future__ import annotations

from functools import partial

import torch

from app.engine.capture import Capturer
from app.engine.chunk_graphs import ChunkGraphs, default_shapes
from app.engine.fused_sampler import SlotSampling, draw_tokens
from app.engine.graphs import GraphSteps, Steps
from app.engine.runner import Runner
from app.engine.slot_decoder import SlotDecoder
from app.engine.states import States
from mamba_core.cache import MambaCache
from mamba_core.fused_step import is_applicable
from mamba_core.lagging import Settler
from mamba_core.modeling_mamba import MambaForCausalLM
from mamba_core.ops.triton.step_tiles import is_many
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
    states = States(cache, None if cache.lag is None else Settler(model.backbone, cache))
    make_steps = partial(GraphSteps, capturer=Capturer(cache.device)) if cuda_graphs else Steps
    decoder = SlotDecoder(model, cache, vocab_size, tables, draw_tokens, make_steps, states)
    if not cuda_graphs:
        return Runner(model, cache, vocab_size, decoder, states=states)
    # a capturer of its own, so that a prefill that cannot be captured does not keep steps from being
    shapes = default_shapes(prefill_budget)
    chunk_graphs = ChunkGraphs(Staggered(model), cache, Capturer(cache.device), shapes)
    return Runner(model, cache, vocab_size, decoder, chunk_graphs, states=states)


@torch.inference_mode()
def may_lag(model: MambaForCausalLM, state_dtype: torch.dtype, num_rows: int | None) -> bool:
    """Whether there are steps, of up to ``num_rows``, that are faster if states may lack a token, to the same bits."""
    device = model.backbone.embeddings.weight.device
    can_be_many = num_rows is None or is_many(num_rows, model.config.intermediate_size, device)
    return can_be_many and state_dtype == torch.float32 and is_applicable(model.backbone)
