"""Functions of device tensors as CUDA graphs that share one pool of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class Captured(Generic[Output]):
    """A graph and what its function returned, which each replay fills again."""

    graph: torch.cuda.CUDAGraph
    output: Output


class Capturer:
    """Captures until a capture fails, and after that never again: the next would most likely fail as well."""

    def __init__(self, device: torch.device) -> None:
        self.can_capture = True
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, name: str, warm_up: Callable[[], object], body: Callable[[], Output]) -> Captured[Output] | None:
        """``body`` as a graph, or None and a line in the log if that cannot be.

        ``warm_up`` is run before, and should do the same as ``body`` without harm: what is compiled, chosen or kept
        at the first call must be so before the capture.
        """
        if not self.can_capture:
            return None
        try:
            return self._capture(warm_up, body)
        except Exception:
            self.can_capture = False
            logger.exception("%s cannot be captured as a CUDA graph and will be slower", name)
            return None

    def _capture(self, warm_up: Callable[[], object], body: Callable[[], Output]) -> Captured[Output]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                warm_up()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = body()
                finally:
                    graph.capture_end()
        finally:
            # a capture may fail while its warm-up is still at work
            current.wait_stream(self._stream)
        return Captured(graph, output)

    @staticmethod
    def borrow(tensor: Tensor) -> Tensor:
        """A contiguous float32 tensor's memory, without keeping it from being used for something else.

        Graphs that share a pool use the same memory, each from its replay to the next one of any of them. A tensor
        that held on to the large output of one graph would keep it from being shared.
        """
        assert tensor.is_contiguous(), "the strides are not told below"
        assert tensor.dtype is torch.float32, "the type is told below"
        interface = {"shape": tuple(tensor.shape), "typestr": "<f4", "data": (tensor.data_ptr(), False), "version": 3}
        return torch.as_tensor(_Memory(interface), device=tensor.device)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Device memory as libraries describe it to each other; see numba's CUDA array interface."""

    __cuda_array_interface__: dict[str, Any]
