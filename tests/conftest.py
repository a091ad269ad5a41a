"""What holds for every test: without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os

import pytest


def _has_gpu() -> bool:
    # the decision must stand before the first import of triton, which reads the variable once
    import torch

    return torch.cuda.is_available()


HAS_GPU = _has_gpu()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
