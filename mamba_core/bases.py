"""What the model inherits from transformers, or stand-ins for a process that only serves.

transformers' base classes bring most of torch's compiler and distributed packages with them, several seconds of a
start, for methods that a server never calls: generate(), from_pretrained(), gradient checkpointing. A process that has
marked the package as one that only serves (``app.engine.bare_import``) gets plain modules in their place.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

IS_SERVING_ONLY: bool = vars(sys.modules["mamba_core"]).get("is_serving_only", False)

if TYPE_CHECKING or not IS_SERVING_ONLY:
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers import initialization as init
    from transformers.initialization import no_init_weights
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
else:
    from collections.abc import Iterator
    from contextlib import ExitStack, contextmanager

    from torch import nn

    @contextmanager
    def no_init_weights() -> Iterator[None]:
        """Leave new layers as they are: random numbers on the meta device would load torch's tracing libraries."""
        with ExitStack() as stack:
            for kind in (nn.modules.conv._ConvNd, nn.Embedding, nn.Linear):
                stack.callback(setattr, kind, "reset_parameters", kind.reset_parameters)
                kind.reset_parameters = lambda _: None
            yield

    # weights are loaded, not made
    init = None

    class PreTrainedConfig:
        """Settings under the names of the fields or of ``attribute_map``; what has no field is kept as it is."""

        attribute_map: ClassVar[dict[str, str]] = {}
        name_or_path = ""
        dtype = None
        return_dict = True
        output_hidden_states = False

        def __init__(self, **settings: Any) -> None:
            kinds = reversed(type(self).__mro__)
            fields = {name: kind for each in kinds for name, kind in vars(each).get("__annotations__", {}).items()}
            for name, kind in fields.items():
                if not kind.startswith("ClassVar"):
                    setattr(self, name, settings.pop(name, getattr(type(self), name)))
            self.__post_init__(**settings)

        def __post_init__(self, **others: Any) -> None:
            for name, value in others.items():
                if not callable(getattr(type(self), name, None)):
                    setattr(self, name, value)

        def __getattr__(self, name: str) -> Any:
            if name not in type(self).attribute_map:
                raise AttributeError(f"the configuration has no {name}")
            return getattr(self, type(self).attribute_map[name])

    class PreTrainedModel(nn.Module):
        """A module that knows its configuration."""

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config

        def post_init(self) -> None:
            """Nothing."""

    class GenerationMixin:
        """Nothing."""

    class GradientCheckpointingLayer(nn.Module):
        """A layer that is never recomputed."""

        gradient_checkpointing = False

    class BaseModelOutputWithPast:
        """Never made."""

    class CausalLMOutputWithPast:
        """Never made."""


__all__ = [
    "IS_SERVING_ONLY",
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "GenerationMixin",
    "GradientCheckpointingLayer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "init",
    "no_init_weights",
]
