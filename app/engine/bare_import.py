"""Imports the model's package without what only training and generate() need."""

from __future__ import annotations

import importlib.util
import sys


def import_for_serving(name: str = "mamba_core") -> None:
    """Make the modules of a package importable without its ``__init__``, and tell them that this process only serves.

    The package's ``__init__`` registers its classes with transformers, which takes seconds and which nobody asks for
    here. Without effect where the package has been imported before. Raises ModuleNotFoundError.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"there is no package {name}", name=name)
    package = importlib.util.module_from_spec(spec)
    package.is_serving_only = True  # type: ignore[attr-defined]
    sys.modules[name] = package
