"""The arrows between rooms, read from the sources with ``ast`` and checked once more in fresh interpreters."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = sys.stdlib_module_names

# who may import what of the project; the longest matching prefix of a module's name is its room
PROJECT_ARROWS: Mapping[str, tuple[str, ...]] = {
    "mamba_core": ("mamba_core",),
    "app": ("app",),
    "app.schemas": ("app.schemas",),
    "app.settings": ("app.engine.config", "app.keys"),
    "app.keys": (),
    "app.logging": (),
    "app.metrics": ("app.engine.request", "app.engine.interface"),
    "app.engine": ("app.engine", "mamba_core"),
    "app.serving": ("app.serving", "app.schemas", "app.engine", "app.settings", "app.metrics", "app.logging"),
    "app.api": (
        "app.api",
        "app.serving",
        "app.schemas",
        "app.engine",
        "app.settings",
        "app.keys",
        "app.metrics",
        "app.logging",
    ),
}

# the two modules at the process boundary, and the messages between them
BOUNDARY = ("app.engine.client", "app.engine.process", "app.engine.messages")

# the scheduler, the books of the slots and the records: no tensor in sight
PURE = tuple(
    f"app.engine.{name}" for name in ("scheduler", "share", "slots", "sequence", "request", "config", "interface")
)

# libraries that have one place; a library that is not named here may be used by every room that has no allow list
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "torch": ("mamba_core", "app.engine"),
    "triton": ("mamba_core", "app.engine"),
    "transformers": ("mamba_core", "app.engine"),
    "safetensors": ("mamba_core",),
    "fastapi": ("app.api",),
    "starlette": ("app.api",),
    "pydantic": ("app.schemas", "app.settings", "app.api", "app.cli"),
    "pydantic_settings": ("app.settings", "app.cli"),
    "tokenizers": ("app.serving",),
    "jinja2": ("app.serving.chat_sandbox", "app.serving.chat_template"),
    "msgspec": BOUNDARY,
    "zmq": BOUNDARY,
    "llguidance": ("app.engine.grammars", "app.engine.gbnf", "app.engine.matchers", "app.serving.grammar_worker"),
}

# what a GPU machine with nothing but torch and transformers can run; their own dependencies count as theirs
CORE_LIBRARIES = frozenset({"torch", "triton", "transformers"})
# what a grammar is: llguidance is imported with the first one
GRAMMARS = ("app.engine.grammars", "app.engine.gbnf", "app.engine.matchers")
MASKS = ("app.engine.constraints", "app.engine.masks", "app.engine.matchers")
COMPILER_LIBRARIES = frozenset({"numba", "llvmlite", "numpy"})
# compiled when a CPU is used; nothing else may need these
COMPILED = ("mamba_core.ops.machine", "mamba_core.ops.native", "mamba_core.ops.numba_ops", "mamba_core.cpu_step")
MODEL_LIBRARIES = CORE_LIBRARIES | {"safetensors", "huggingface_hub", "tqdm"}

# a package's __init__ runs before its members, so that of the engine is held to the rules of its purest member
PURE_PACKAGES = ("app", "app.engine")


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    source: str
    is_package: bool = False


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imported_names(module: Module, known: frozenset[str]) -> Iterator[str]:
    """Dotted names of everything a module imports, at any depth of its code, relative imports resolved."""
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    for node in ast.walk(ast.parse(module.source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            members = (f"{base}.{alias.name}" for alias in node.names)
            yield from (member if member in known else base for member in members)
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and arg.value)


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def room_of(name: str) -> str:
    rooms = [room for room in PROJECT_ARROWS if is_within(name, (room,))]
    return max(rooms, key=len)


def allowed_libraries(name: str) -> frozenset[str] | None:
    """Libraries beside the standard one that a module may import; None where there is no allow list."""
    if name in PURE_PACKAGES or is_within(name, PURE):
        return frozenset()
    if is_within(name, BOUNDARY):
        return CORE_LIBRARIES | {"msgspec", "zmq"}
    if is_within(name, (*GRAMMARS, *MASKS)):
        return CORE_LIBRARIES | {"llguidance", "numpy", "huggingface_hub"}
    if is_within(name, ("app.engine",)):
        return CORE_LIBRARIES
    if is_within(name, COMPILED):
        return CORE_LIBRARIES | COMPILER_LIBRARIES
    if is_within(name, ("mamba_core",)):
        return MODEL_LIBRARIES
    if is_within(name, ("app.schemas",)):
        return frozenset({"pydantic", "pydantic_core", "annotated_types", "typing_extensions"})
    return None


def project_violation(module: str, target: str) -> str | None:
    room = room_of(module)
    if target == "app" and room != "mamba_core":
        return None
    if not is_within(target, PROJECT_ARROWS[room]):
        return f"{room} may not import {target}"
    if is_within(module, PURE) and not is_within(target, PURE):
        return f"pure Python may not import {target}"
    is_core = is_within(module, ("app.engine",)) and not is_within(module, BOUNDARY)
    if is_core and is_within(target, BOUNDARY):
        return f"the engine's core may not import {target}"
    return None


def library_violation(module: str, target: str) -> str | None:
    library = target.partition(".")[0]
    if library in STDLIB:
        return None
    if not is_within(module, ONLY_IN.get(library, (module,))):
        return f"{library} is for {', '.join(ONLY_IN[library])} alone"
    allowed = allowed_libraries(module)
    if allowed is not None and library not in allowed:
        return f"may import the standard library and {sorted(allowed)} alone, not {library}"
    return None


def violations(modules: list[Module]) -> list[str]:
    """One line for every import that goes against an arrow."""
    known = frozenset(module.name for module in modules)
    found = []
    for module in modules:
        for target in sorted(set(imported_names(module, known))):
            is_ours = is_within(target, ("app", "mamba_core"))
            problem = (project_violation if is_ours else library_violation)(module.name, target)
            if problem:
                found.append(f"{module.name}: {problem}")
    return found


def project_modules() -> list[Module]:
    modules = []
    for path in sorted([*ROOT.glob("app/**/*.py"), *ROOT.glob("mamba_core/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return modules


def test_the_project_keeps_its_arrows() -> None:
    modules = project_modules()
    assert {"app.api", "app.engine.request", "mamba_core.ops"} <= {module.name for module in modules}
    assert violations(modules) == []


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("mamba_core.cache", "import app.settings", "mamba_core may not import app.settings"),
        ("mamba_core.cache", "from app import __version__", "mamba_core may not import app"),
        ("mamba_core.cache", "import numba", "not numba"),
        ("app.engine.runner", "from app.serving import translate", "app.engine may not import app.serving"),
        ("app.engine.runner", "from ..api import routes", "app.engine may not import app.api"),
        ("app.engine.runner", "from . import client", "core may not import app.engine.client"),
        ("app.engine.runner", "import msgspec", "msgspec is for"),
        ("app.engine.runner", "import numpy", "not numpy"),
        ("app.engine.process", "import fastapi.responses", "fastapi is for app.api alone"),
        ("app.engine.process", "from tokenizers import Tokenizer", "tokenizers is for app.serving alone"),
        ("app.engine.process", "def f():\n    import pydantic", "pydantic is for"),
        ("app.engine.scheduler", "import torch", "not torch"),
        ("app.engine.scheduler", "from app.engine.runner import Runner", "pure Python may not import"),
        ("app.engine.slots", "from mamba_core import ops", "pure Python may not import mamba_core"),
        ("app.serving.translate", "import torch.nn as nn", "torch is for"),
        ("app.serving.translate", "from starlette.requests import Request", "starlette is for app.api alone"),
        ("app.serving.translate", "from app.api.errors import ApiError", "app.serving may not import app.api"),
        ("app.api.routes", "if TYPE_CHECKING:\n    from torch import Tensor", "torch is for"),
        ("app.api.routes", "importlib.import_module('transformers')", "transformers is for"),
        ("app.api.routes", "__import__('mamba_core.ops')", "app.api may not import mamba_core.ops"),
        ("app.schemas.completions", "from app.serving import translate", "app.schemas may not import"),
        ("app.schemas.completions", "import orjson", "not orjson"),
        ("app.metrics", "import app.api", "app.metrics may not import app.api"),
        ("app.main", "import fastapi", "fastapi is for app.api alone"),
    ],
)
def test_a_planted_violation_is_found(name: str, source: str, problem: str) -> None:
    known = ("app", "app.api", "app.serving", "app.engine", "app.engine.client", "app.engine.runner")
    modules = [Module(package, "", is_package=True) for package in known]
    (found,) = violations([*modules, Module(name, source)])
    assert found.startswith(f"{name}: ")
    assert problem in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "mamba_core.modeling_mamba",
            "import math\nimport torch\nfrom transformers import PreTrainedModel\nfrom . import ops",
        ),
        ("app.engine.scheduler", "from collections import deque\nfrom app.engine.request import GenerationRequest"),
        ("app.engine.runner", "import torch\nfrom mamba_core import ops\nfrom app.engine.sequence import Sequence"),
        ("app.engine.client", "import zmq.asyncio\nimport msgspec\nfrom app.engine.interface import EngineError"),
        ("app.serving.translate", "import tokenizers\nfrom app.schemas.completions import CompletionRequest"),
        ("app.api.routes", "import fastapi\nfrom app import __version__\nfrom app.serving import translate"),
        ("app.main", "from app.api import create_app\nfrom app.engine.client import EngineProcessClient"),
    ],
)
def test_what_the_arrows_allow_is_not_reported(name: str, source: str) -> None:
    assert violations([Module("app", "", is_package=True), Module(name, source)]) == []


def run_python(code: str, *names: str) -> None:
    """Run code in a fresh interpreter with the names of modules as its arguments; fail with its output."""
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


IMPORT_WITHOUT = """
import importlib, sys
banned, names = sys.argv[1].split(","), sys.argv[2:]
sys.modules.update(dict.fromkeys(filter(None, banned)))
for name in names:
    importlib.import_module(name)
"""

IMPORT_AND_LOOK = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = sorted({"torch", "triton", "transformers"} & set(sys.modules))
    assert not loaded, f"{name} brings {loaded} into the API process"
"""


def names_within(*prefixes: str) -> list[str]:
    # a __main__ module starts its program when it is imported
    names = (module.name for module in project_modules())
    return [name for name in names if is_within(name, prefixes) and not name.endswith("__main__")]


def test_the_api_process_never_loads_torch() -> None:
    rooms = names_within("app.api", "app.serving", "app.schemas")
    rooms += names_within("app.main", "app.cli", "app.settings", "app.metrics", "app.logging", "app.engine.client")
    run_python(IMPORT_AND_LOOK, *rooms)


def test_a_module_that_loads_torch_is_noticed() -> None:
    with pytest.raises(AssertionError, match="brings .*torch"):
        run_python(IMPORT_AND_LOOK, "mamba_core.ops")


def test_records_and_books_need_the_standard_library_alone() -> None:
    banned = sorted(set(ONLY_IN) | {"numpy", "orjson", "yaml", "uvicorn", "mamba_core"})
    run_python(IMPORT_WITHOUT, ",".join(banned), *names_within(*PURE))


def test_model_and_engine_core_run_without_the_service() -> None:
    banned = ["msgspec", "zmq", "fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "orjson", "yaml"]
    names = [name for name in names_within("app.engine") if not is_within(name, BOUNDARY)]
    # yaml is transformers' own dependency, so the engine cannot be shown to do without it
    run_python(IMPORT_WITHOUT, ",".join(banned[:-1]), *names, *names_within("mamba_core"))


def test_a_banned_library_stops_the_import() -> None:
    with pytest.raises(AssertionError, match="torch"):
        run_python(IMPORT_WITHOUT, "torch", "mamba_core.ops.packing")
