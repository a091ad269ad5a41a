"""Decode on a CPU: one token per row through all layers in one compiled function, run by all threads together.

Each thread takes the rows one after the other wherever states move on, so that rows of the same slot are tokens that
follow one another: few tokens of whatever sequences are a step as well.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mamba_core.cache import MambaCache
from mamba_core.modeling_mamba import MambaBlock, MambaModel
from mamba_core.ops import Packing
from mamba_core.ops.native.callbacks import head_callback, step_callback
from mamba_core.ops.native.scratch import Scratch
from mamba_core.ops.native.step_kernels import Field, HeadField, LayerField
from mamba_core.ops.native.threads import Team
from mamba_core.ops.native.units import Kind

_LOG2E = 1.4426950408889634
# above this torch's products, which share what they have loaded among more rows, are faster
_MOST_ROWS = 64
_DTYPES = (torch.float32, torch.bfloat16)
# beside the address of the decay, in the order of ``LayerField``
_Place = tuple[dict[str, Tensor | None], str]


class CpuStep:
    """What steps of one model keep from one to the next: threads, scratch memory, and where the weights lie."""

    def __init__(self, *, may_use_pairs: bool = True) -> None:
        self._may_use_pairs = may_use_pairs
        self._lock = threading.Lock()
        self._team = Team()
        self._weights: _Weights | None = None
        self._room: _Room | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuStep:
        return CpuStep(may_use_pairs=self._may_use_pairs)

    def __reduce__(self) -> tuple[type[CpuStep], tuple[()]]:
        return CpuStep, ()

    def can_step(self, model: MambaModel, cache: MambaCache) -> bool:
        """Whether ``step`` computes what the layers of this model do, as its weights and the cache are now."""
        weight = model.embeddings.weight
        mixer = cast(list[MambaBlock], model.layers)[0].mixer
        return (
            weight.dtype in _DTYPES
            and cache.conv.dtype == weight.dtype
            and cache.ssm.dtype == mixer.A_log.dtype == mixer.D.dtype == torch.float32
            and cache.device.type == "cpu"
            # a decay made anew for every step would lie at another address each time
            and not mixer.A_log.is_inference()
        )

    @staticmethod
    def suits(packing: Packing) -> bool:
        """Whether ``step`` takes these tokens: one of each row, or several that are to go that way.

        How many there are does not matter. What comes of a token in a step does not depend on the others, and is not
        quite what comes of it layer by layer.
        """
        if packing.is_step:
            return True
        return packing.in_steps and 0 < packing.num_tokens == int(packing.cu_seqlens[-1])

    def can_project(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether ``project`` takes these, and is no slower than torch."""
        return (
            hidden.dtype in _DTYPES
            and weight.dtype in (hidden.dtype, torch.int8)
            and weight.is_contiguous()
            and 0 < hidden.shape[:-1].numel() <= _MOST_ROWS
        )

    def step(self, model: MambaModel, tokens: Tensor, slots: Tensor, cache: MambaCache) -> Tensor:
        """tokens, slots [B] int64 -> hidden [B, H] after the final norm; the slots of the cache move on by one token.

        A slot that is named several times takes its tokens in their order. Raises IndexError for a token or a slot that
        there is not.
        """
        _check_range("token", tokens, model.config.vocab_size)
        _check_range("slot", slots, cache.num_slots)
        tokens, slots = tokens.contiguous(), slots.contiguous()
        weight = model.embeddings.weight
        results = torch.empty(len(tokens), model.config.hidden_size, dtype=weight.dtype)
        with self._lock:
            kind = Kind.of(weight.dtype, _matrix_dtype(model), may_use_pairs=self._may_use_pairs)
            plan = self._ready_plan(model, len(tokens), kind)
            plan[Field.TOKENS], plan[Field.SLOTS] = tokens.data_ptr(), slots.data_ptr()
            plan[Field.NUM_ROWS], plan[Field.RESULTS] = len(tokens), results.data_ptr()
            _place(plan, model, cache)
            self._team.run(step_callback(kind), plan, amount=len(tokens))
        return results

    def project(self, hidden: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
        """hidden [T, H], weight [V, H], of one dtype -> [T, V] in fp32; an int8 weight has scales [V] in fp32."""
        hidden = hidden.contiguous()
        (num_rows, length), num_threads = hidden.shape, torch.get_num_threads()
        results = torch.empty(num_rows, len(weight))
        kind = Kind.of(hidden.dtype, weight.dtype, may_use_pairs=self._may_use_pairs)
        scratch, record = Scratch(), np.zeros(HeadField.SIZE, np.int64)
        inputs, stride = scratch.rows(num_rows, length * kind.staged_bytes)
        record[HeadField.INPUTS], record[HeadField.INPUTS_STRIDE] = inputs, stride
        if scales is not None:
            record[HeadField.SCALES] = scales.data_ptr()
            rounded, stride = scratch.rows(num_rows * num_threads, 64 + 2 * length)
            record[HeadField.ROUNDED], record[HeadField.ROUNDED_STRIDE] = rounded, stride
            record[HeadField.ROUNDED_OF_THREAD] = stride * num_rows
        record[HeadField.HIDDEN_STATES], record[HeadField.RESULTS] = hidden.data_ptr(), results.data_ptr()
        record[HeadField.NUM_ROWS], record[HeadField.LENGTH] = num_rows, length
        record[HeadField.WEIGHTS], record[HeadField.NUM_OUTPUTS] = weight.data_ptr(), len(weight)
        with self._lock:
            self._team.run(head_callback(kind), record)
        return results

    def _ready_plan(self, model: MambaModel, num_rows: int, kind: Kind) -> np.ndarray:
        """The plan of a step, but for what changes from step to step."""
        room, num_threads = self._room, torch.get_num_threads()
        weights = self._weights
        if weights is None or not weights.are_current(model):
            self._weights, room = _Weights.find(model), None
            weights = self._weights
        if room is None or room.num_rows < num_rows or room.num_threads != num_threads or room.kind != kind:
            self._room = room = _Room.make(model, num_rows, num_threads, kind, weights)
        return room.plan


@dataclass(frozen=True, slots=True)
class _Weights:
    """Where the weights of a model have been found: the part of a plan that holds their addresses.

    places: the parameters, by the dictionaries of their modules; addresses: of each, 0 for a bias that there is not.
    decays: of each layer, A times log2(e) and the A_log it was made from, whose address nothing else has while it is
    held on to; decay_places and versions tell whether that has changed.
    """

    places: list[_Place]
    addresses: list[int]
    decays: list[tuple[Tensor, Tensor]]
    decay_places: list[dict[str, Tensor | None]]
    versions: list[int]
    table: np.ndarray

    @classmethod
    def find(cls, model: MambaModel) -> _Weights:
        layers = cast(list[MambaBlock], model.layers)
        places = [_place_of(model.norm_f, "weight"), _place_of(model.embeddings, "weight")]
        num_others = len(places) + len(layers)
        places += [_place_of(layer.mixer, "A_log") for layer in layers]
        decays = []
        for layer in layers:
            places += _layer_places(layer)
            decays.append(((layer.mixer.A() * _LOG2E).contiguous(), layer.mixer.A_log.detach()))
        _refuse_strided(places)
        addresses = _addresses(places)
        rows = np.array(addresses[num_others:], np.int64).reshape(len(layers), LayerField.SIZE - 1)
        table = np.insert(rows, LayerField.DECAY, [decay.data_ptr() for decay, _ in decays], axis=1).reshape(-1)
        decay_places = [_place_of(layer.mixer, "A_log")[0] for layer in layers]
        versions = [layer.mixer.A_log._version for layer in layers]
        return cls(places, addresses, decays, decay_places, versions, table)

    def are_current(self, model: MambaModel) -> bool:
        layers = cast(list[MambaBlock], model.layers)
        return (
            len(layers) == len(self.decays)
            and self.addresses == _addresses(self.places)
            and self.versions == [cast(Tensor, held["A_log"])._version for held in self.decay_places]
        )


def _matrix_dtype(model: MambaModel) -> torch.dtype:
    """The type of the large matrices: that of the model, or int8."""
    return cast(list[MambaBlock], model.layers)[0].mixer.in_proj.weight.dtype


def _layer_places(layer: MambaBlock) -> list[_Place]:
    """In the order of ``LayerField``, without the decay."""
    mixer = layer.mixer
    modules = [
        (layer.norm, "weight"),
        (mixer.in_proj, "weight"),
        (mixer.in_proj, "bias"),
        (mixer.conv1d, "weight"),
        (mixer.conv1d, "bias"),
        (mixer.x_proj, "weight"),
        (mixer.dt_proj, "weight"),
        (mixer.dt_proj, "bias"),
        (mixer, "D"),
        (mixer.out_proj, "weight"),
        (mixer.out_proj, "bias"),
        (mixer.in_proj, "scales"),
        (mixer.x_proj, "scales"),
        (mixer.out_proj, "scales"),
    ]
    return [_place_of(module, name) for module, name in modules]


def _place_of(module: nn.Module, name: str) -> _Place:
    return cast(dict[str, Tensor | None], module._parameters), name


def _addresses(places: Sequence[_Place]) -> list[int]:
    return [0 if (tensor := held.get(name)) is None else tensor.data_ptr() for held, name in places]


def _refuse_strided(places: Sequence[_Place]) -> None:
    for held, name in places:
        tensor = held.get(name)
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"a weight of shape {tuple(tensor.shape)} does not lie in memory row by row")


@dataclass(frozen=True, slots=True)
class _Room:
    """Scratch memory for steps of up to ``num_rows`` rows, and the plan that names it."""

    num_rows: int
    num_threads: int
    kind: Kind
    scratch: Scratch
    plan: np.ndarray

    @classmethod
    def make(cls, model: MambaModel, num_rows: int, num_threads: int, kind: Kind, weights: _Weights) -> _Room:
        mixer = cast(list[MambaBlock], model.layers)[0].mixer
        hidden, channels = model.config.hidden_size, mixer.channels
        scratch, plan = Scratch(), np.zeros(Field.SIZE + len(weights.table), np.int64)
        plan[Field.SIZE :] = weights.table
        plan[Field.NUM_LAYERS], plan[Field.HIDDEN], plan[Field.CHANNELS] = len(model.layers), hidden, channels
        plan[Field.STATES], plan[Field.RANK], plan[Field.TAPS] = mixer.states, mixer.rank, model.config.conv_kernel
        plan[Field.RESIDUAL], plan[Field.RESIDUAL_STRIDE] = scratch.rows(num_rows, 4 * hidden)
        plan[Field.OUTPUT], _ = scratch.rows(num_rows, 4 * hidden)
        plan[Field.NORMED], plan[Field.NORMED_STRIDE] = scratch.rows(num_rows, kind.staged_bytes * hidden)
        plan[Field.CHOSEN], plan[Field.CHOSEN_STRIDE] = scratch.rows(num_rows, kind.staged_bytes * channels)
        if kind.has_words:
            rounded, stride = scratch.rows(num_rows * num_threads, 64 + 2 * max(hidden, channels))
            plan[Field.ROUNDED], plan[Field.ROUNDED_STRIDE] = rounded, stride
            plan[Field.ROUNDED_OF_THREAD] = stride * num_rows
        plan[Field.XZ], plan[Field.XZ_STRIDE] = scratch.rows(num_rows, 8 * channels)
        plan[Field.LOW], plan[Field.LOW_STRIDE] = scratch.rows(num_rows, 4 * (mixer.rank + 2 * mixer.states))
        plan[Field.RANKS], plan[Field.RANKS_STRIDE] = scratch.rows(
            num_rows * num_threads, kind.input_bytes * mixer.rank
        )
        plan[Field.RANKS_OF_THREAD] = plan[Field.RANKS_STRIDE] * num_rows
        plan[Field.RATE], plan[Field.RATE_STRIDE] = scratch.rows(num_rows, 4 * channels)
        plan[Field.GAIN], _ = scratch.rows(num_rows, 4 * channels)
        inner_eps = -1.0 if mixer.inner_norm_eps is None else mixer.inner_norm_eps
        plan[[Field.EPS, Field.INNER_EPS]] = np.array([model.norm_f.eps, inner_eps], np.float32).view(np.int32)
        return cls(num_rows, num_threads, kind, scratch, plan)


def _place(plan: np.ndarray, model: MambaModel, cache: MambaCache) -> None:
    """Write down where the states lie, and what lies outside of the layers."""
    plan[Field.EMBEDDINGS] = model.embeddings.weight.data_ptr()
    plan[Field.FINAL_NORM] = model.norm_f.weight.data_ptr()
    plan[Field.CONV_STATE], plan[Field.CONV_LAYER] = cache.conv.data_ptr(), cache.conv.nbytes // cache.conv.shape[0]
    plan[Field.SSM_STATE], plan[Field.SSM_LAYER] = cache.ssm.data_ptr(), cache.ssm.nbytes // cache.ssm.shape[0]


def _check_range(name: str, values: Tensor, limit: int) -> None:
    low, high = values.aminmax()
    if low < 0 or high >= limit:
        raise IndexError(f"{name} {int(low if low < 0 else high)} is outside 0..{limit - 1}")
