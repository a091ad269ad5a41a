"""What is installed and what goes into the image agree with the sources."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

# belong to a dependency that is declared, and come with it: starlette with fastapi, pydantic_core with pydantic,
# triton with the builds of torch that can use it
BORROWED = {"starlette", "pydantic_core", "triton", "anyio"}


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["project"])


def names_of(requirements: list[str]) -> set[str]:
    return {normalize(re.split(r"[<>=!;\[ ]", line)[0]) for line in requirements}


def imported_libraries(*folders: str) -> set[str]:
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"app", "mamba_core", "benchmarks"}


def distributions(libraries: set[str]) -> set[str]:
    owners = packages_distributions()
    return {normalize(owners[library][0]) for library in libraries if library in owners}


def test_what_is_imported_is_declared(project: dict[str, Any]) -> None:
    libraries = imported_libraries("app", "mamba_core")
    assert {"torch", "fastapi"} <= libraries
    assert distributions(libraries - BORROWED) <= names_of(project["dependencies"])


def test_what_is_declared_is_used(project: dict[str, Any]) -> None:
    # chosen by uvicorn by name, and a package of files
    implied = {"httptools", "fastapi-swagger"}
    used = distributions(imported_libraries("app", "mamba_core")) | implied
    assert names_of(project["dependencies"]) - used == set()


def test_benchmarks_need_no_more_than_their_extras(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    declared = names_of(project["dependencies"] + extras["bench"] + extras["compare"])
    assert distributions(imported_libraries("benchmarks") - BORROWED) <= declared


def test_the_command_exists(project: dict[str, Any]) -> None:
    module, function = project["scripts"]["mamba-serve"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert 'ENTRYPOINT ["mamba-serve", "--host", "0.0.0.0"]' in DOCKERFILE


def test_contributing_names_every_dependency(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    declared = names_of(sum((extras[name] for name in ("test", "dev", "train")), project["dependencies"]))
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Dependencies")[1]
    named = {normalize(word) for word in re.findall(r"[a-z][a-z0-9-]+", table)}
    missing = {name for name in declared - named if not name.startswith(("types-", "mamba-serve"))}
    assert missing == set()


def copied_paths() -> list[str]:
    copies = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    return [source for line in copies for source in line.split()[:-1]]


def test_the_context_holds_what_the_image_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*"
    for source in copied_paths():
        assert any(fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in let_in), source
        assert (ROOT / source).exists(), source


def test_the_image_fits_the_manifest() -> None:
    deployment = next(iter(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(user), int(group))
    assert f"EXPOSE {container['ports'][0]['containerPort']}\n" in DOCKERFILE
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    for variable in ("HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        (path,) = re.findall(rf"\b{variable}=(\S+)", DOCKERFILE)
        assert any(path == mount or path.startswith(f"{mount}/") for mount in writable), variable


def test_the_shipped_model_is_the_same_everywhere() -> None:
    (default,) = re.findall(r"^MODEL \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert (ROOT / default / "config.json").is_file()
    for file in ("Dockerfile", ".dockerignore", "deploy/kubernetes.yaml"):
        assert default in (ROOT / file).read_text(encoding="utf-8"), file
