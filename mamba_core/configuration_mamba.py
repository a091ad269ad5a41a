"""The numbers a Mamba model is built from, under the names transformers and flash-linear-attention give them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from mamba_core.bases import PreTrainedConfig

# names that mean the same thing elsewhere: flash-linear-attention's and the paper's code to transformers'
_ALIASES = {
    "norm_eps": "layer_norm_epsilon",
    "dt_rank": "time_step_rank",
    "dt_scale": "time_step_scale",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_scheme": "time_step_init_scheme",
    "dt_init_floor": "time_step_floor",
}

_MINIMA = {
    "vocab_size": 1,
    "hidden_size": 1,
    "state_size": 1,
    "num_hidden_layers": 1,
    "expand": 1,
    "conv_kernel": 2,
    "intermediate_size": 1,
    "time_step_rank": 1,
}
_MOST_LAYERS = 100_000
_FLAGS = (
    "use_bias",
    "use_conv_bias",
    "residual_in_fp32",
    "rescale_prenorm_residual",
    "use_cache",
    "tie_word_embeddings",
    "fuse_linear_cross_entropy",
    "use_l2warp",
)
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


class MambaConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """Configuration of a Mamba language model (Gu & Dao 2023).

    Accepts the fields of transformers' ``mamba`` and of flash-linear-attention's ``models/mamba`` configuration; the
    aliases above are readable and writable under both names and stored under transformers'. Defaults are
    transformers'. ``intermediate_size`` is ``expand * hidden_size`` unless given; ``time_step_rank`` "auto" becomes
    ``ceil(hidden_size / 16)``. ``fuse_linear_cross_entropy`` computes the loss from ``labels`` piece by piece and
    returns no logits beside it. Raises ValueError naming the field that makes no sense.
    """

    model_type = "mamba"
    attribute_map: ClassVar[dict[str, str]] = _ALIASES
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    expand: int = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_rank: str | int = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._take_aliases(kwargs)
        intermediate_size = kwargs.pop("intermediate_size", None)
        self._check_integers("hidden_size", "expand", "num_hidden_layers")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {_MOST_LAYERS}, got {self.num_hidden_layers}")
        self.intermediate_size = self.expand * self.hidden_size if intermediate_size is None else intermediate_size
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def layer_types(self) -> list[str]:
        """The kind of every layer, in transformers' vocabulary."""
        return ["linear_attention"] * self.num_hidden_layers

    def _take_aliases(self, kwargs: dict[str, Any]) -> None:
        for alias, name in _ALIASES.items():
            if alias not in kwargs:
                continue
            value, given = kwargs.pop(alias), getattr(self, name)
            if given not in (value, getattr(type(self), name)):
                raise ValueError(f"{alias} {value!r} and {name} {given!r} are the same setting and differ")
            setattr(self, name, value)

    def _check(self) -> None:
        self._check_integers(*_MINIMA)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in _TOKEN_IDS:
            self._check_token_ids(name)
        self._check_number("layer_norm_epsilon")
        self._check_number("initializer_range", zero_allowed=True)
        self._check_time_step()
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act must be 'silu' or 'swish', got {self.hidden_act!r}")
        if self.use_l2warp:
            raise ValueError("use_l2warp is not supported")
        if type(self).model_type == "mamba" and getattr(self, "mixer_rms_eps", None) is not None:
            raise ValueError("mixer_rms_eps belongs to model_type 'falcon_mamba'")

    def _check_time_step(self) -> None:
        for name in ("time_step_scale", "time_step_min", "time_step_max", "time_step_floor"):
            self._check_number(name)
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                f"time_step_min (dt_min) {self.time_step_min} is above time_step_max (dt_max) {self.time_step_max}"
            )
        if self.time_step_init_scheme not in ("random", "constant"):
            raise ValueError(
                f"time_step_init_scheme (dt_init_scheme) must be 'random' or 'constant', "
                f"got {self.time_step_init_scheme!r}"
            )

    def _check_integers(self, *names: str) -> None:
        for name in names:
            value, minimum = getattr(self, name), _MINIMA[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{_both_names(name)} must be an integer of at least {minimum}, got {value!r}")

    def _check_number(self, name: str, zero_allowed: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and not zero_allowed):
            bound = "zero or more" if zero_allowed else "above zero"
            raise ValueError(f"{_both_names(name)} must be a finite number {bound}, got {value!r}")

    def _check_token_ids(self, name: str) -> None:
        value = getattr(self, name)
        ids = value if isinstance(value, list | tuple) and name == "eos_token_id" else [value]
        for token_id in ids:
            if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int)):
                raise ValueError(f"{name} must be an integer or null, got {value!r}")


class FalconMambaConfig(MambaConfig):
    """Configuration of FalconMamba: Mamba with a weightless RMS norm on B, C and dt, of epsilon ``mixer_rms_eps``."""

    model_type = "falcon_mamba"

    mixer_rms_eps: float = 1e-6

    def _check(self) -> None:
        super()._check()
        self._check_number("mixer_rms_eps")


def _both_names(name: str) -> str:
    alias = next((alias for alias, canonical in _ALIASES.items() if canonical == name), None)
    return name if alias is None else f"{name} ({alias})"
