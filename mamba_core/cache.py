"""The recurrent state of many sequences: constant memory per sequence, addressed by slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_core.configuration_mamba import MambaConfig
from mamba_core.ops.lag import BEHIND, Lag

Slots = int | Sequence[int] | Tensor


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """A copy of one slot: conv [layers, D, K-1] and ssm [layers, D, N], in the dtypes of the cache it came from."""

    conv: Tensor
    ssm: Tensor

    @property
    def num_bytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes

    def to(self, device: torch.device | str) -> StateSnapshot:
        """The same snapshot on another device, bit-equal."""
        return StateSnapshot(self.conv.to(device), self.ssm.to(device))


class MambaCache:
    """The states of ``num_slots`` sequences, allocated once and written in place.

    conv [layers, S, D, K-1]: the last K-1 inputs of each convolution, oldest first. ssm [layers, S, D, N]. A slot
    starts as zeros. Under ``generate()`` row i of the batch is slot i. On a GPU conv is a view of [layers, S, K-1, D],
    so that threads read neighbouring channels at once.

    With ``lag``, steps of many rows may leave slots behind (``Packing.may_lag``), and whoever continues these in
    another way has them settled first, see ``lagging.Settler``.
    """

    # what generate() asks of any cache: neither static-compiled nor cut back to an earlier token
    is_compileable = False
    is_croppable = False

    def __init__(self, conv: Tensor, ssm: Tensor, lag: Lag | None = None) -> None:
        if conv.shape[:3] != ssm.shape[:3]:
            raise ValueError(f"conv {tuple(conv.shape)} and ssm {tuple(ssm.shape)} do not belong together")
        self.conv = conv
        self.ssm = ssm
        self.lag = lag
        self._num_columns = 0

    @classmethod
    def from_config(
        cls,
        config: MambaConfig,
        num_slots: int,
        *,
        dtype: torch.dtype,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        may_lag: bool = False,
    ) -> MambaCache:
        """Zeroed cache for a model: ``dtype`` is the model's, ``state_dtype`` that of the SSM state."""
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        if may_lag and state_dtype != torch.float32:
            raise ValueError(f"states that are rounded to {state_dtype} cannot take two tokens at once")
        (channels, taps), ssm_shape = _slot_shapes(config)
        layers = config.num_hidden_layers
        is_tap_major = torch.device(device).type == "cuda"
        conv_shape = (taps, channels) if is_tap_major else (channels, taps)
        # tensors made under inference mode could never be written outside of it
        with torch.inference_mode(False):
            conv = torch.zeros(layers, num_slots, *conv_shape, dtype=dtype, device=device)
            ssm = torch.zeros(layers, num_slots, *ssm_shape, dtype=state_dtype, device=device)
            lag = Lag.zeros(layers, num_slots, *ssm_shape, dtype=dtype, device=device) if may_lag else None
        return cls(conv.mT if is_tap_major else conv, ssm, lag)

    @staticmethod
    def slot_bytes(
        config: MambaConfig, dtype: torch.dtype, state_dtype: torch.dtype = torch.float32, *, may_lag: bool = False
    ) -> int:
        """Bytes one slot takes, without allocating it."""
        (channels, taps), (_, states) = _slot_shapes(config)
        layers = config.num_hidden_layers
        per_layer = channels * (taps * dtype.itemsize + states * state_dtype.itemsize)
        return layers * per_layer + (Lag.slot_bytes(layers, channels, states, dtype) if may_lag else 0)

    @property
    def num_slots(self) -> int:
        return self.conv.shape[1]

    @property
    def bytes_per_slot(self) -> int:
        lag_bytes = 0 if self.lag is None else self.lag.nbytes
        return (self.conv.nbytes + self.ssm.nbytes + lag_bytes) // self.num_slots

    @property
    def device(self) -> torch.device:
        return self.ssm.device

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(conv [S, D, K-1], ssm [S, D, N]) of one layer, as views."""
        return self.conv[index], self.ssm[index]

    def zero(self, slots: Slots) -> None:
        """Make slots fresh, by writing: what they held, NaN included, is gone."""
        index = self._index(slots)
        self.conv.index_fill_(1, index, 0)
        self.ssm.index_fill_(1, index, 0)
        if self.lag is not None:
            self.lag.phases.index_fill_(0, index, 0)

    def copy(self, src: Slots, dst: Slots) -> None:
        """Copy slots ``src`` over ``dst``, one to one, or one ``src`` over many ``dst``."""
        source, target = self._index(src), self._index(dst)
        if source.numel() == 1:
            source = source.expand(target.numel())
        if source.numel() != target.numel():
            raise ValueError(f"{source.numel()} source slots for {target.numel()} destinations")
        for state in self._states():
            state.index_copy_(1, target, state.index_select(1, source))

    def export(self, slot: int) -> StateSnapshot:
        """A copy of one slot that later steps do not touch. Raises ValueError if its states lack a token."""
        self._index(slot)
        if self.lag is not None and self.lag.phases[slot] == BEHIND:
            raise ValueError(f"the states of slot {slot} lack a token: settle it first")
        return StateSnapshot(self.conv[:, slot].clone(), self.ssm[:, slot].clone())

    def load(self, slot: int, snapshot: StateSnapshot) -> None:
        """Continue ``slot`` from a snapshot, bit-equal; raises ValueError if its shapes or dtypes are not ours."""
        self._index(slot)
        for name, ours, theirs in (("conv", self.conv, snapshot.conv), ("ssm", self.ssm, snapshot.ssm)):
            expected = (ours.shape[0], *ours.shape[2:])
            if tuple(theirs.shape) != expected or theirs.dtype != ours.dtype:
                raise ValueError(
                    f"snapshot {name} is {tuple(theirs.shape)} {theirs.dtype}, the cache needs {expected} {ours.dtype}"
                )
        self.conv[:, slot].copy_(snapshot.conv)
        self.ssm[:, slot].copy_(snapshot.ssm)
        if self.lag is not None:
            self.lag.phases[slot] = 0

    def reorder(self, beam_idx: Tensor) -> None:
        """Let slot i hold what slot ``beam_idx[i]`` held, for all slots; beam_idx [S]."""
        if beam_idx.shape != (self.num_slots,):
            raise ValueError(f"beam_idx must have shape ({self.num_slots},), got {tuple(beam_idx.shape)}")
        index = beam_idx.to(self.device)
        for state in self._states():
            state.copy_(state.index_select(1, index))

    def reset(self) -> None:
        """Make every slot fresh."""
        self.conv.zero_()
        self.ssm.zero_()
        if self.lag is not None:
            self.lag.phases.zero_()
        self._num_columns = 0

    def get_seq_length(self) -> int:
        """Columns of ``input_ids`` that went through this cache so far, padding included."""
        return self._num_columns

    def advance(self, num_columns: int) -> None:
        """Note that ``num_columns`` more columns of ``input_ids`` went through."""
        self._num_columns += num_columns

    reorder_cache = reorder

    def _states(self) -> tuple[Tensor, ...]:
        """All that a slot holds, as views [layers, S, ...], of which one may have but one layer."""
        lag = self.lag
        return (self.conv, self.ssm) if lag is None else (self.conv, self.ssm, lag.phases[None], lag.inputs, lag.b)

    def _index(self, slots: Slots) -> Tensor:
        if isinstance(slots, Tensor):
            return slots.to(self.device, torch.int64).reshape(-1)
        numbers = [slots] if isinstance(slots, int) else list(slots)
        for slot in numbers:
            if not 0 <= slot < self.num_slots:
                raise ValueError(f"slot {slot} is outside 0..{self.num_slots - 1}")
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)


def _slot_shapes(config: MambaConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    channels = config.intermediate_size
    return (channels, config.conv_kernel - 1), (channels, config.state_size)
