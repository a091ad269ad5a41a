"""From a machine with Python and make to an environment: which Python, which torch, and what is said when it fails."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FIND_PYTHON = ROOT / "scripts" / "find_python.sh"
TORCH = "torch>=2.11,<2.14"


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakePip:
    """Answers the calls in turn and keeps their arguments."""

    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)
        self.calls: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> bool:
        self.calls.append(list(arguments))
        return self.answers.pop(0)


def fake_python(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def find_python(path: Path, *candidates: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path)}
    command = ["/bin/sh", str(FIND_PYTHON), *candidates]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def of_version(major: int, minor: int, missing: str = "none") -> str:
    """A shell script that plays a Python: it runs the checks of find_python.sh with a version made up."""
    patch = f"import sys; sys.version_info = ({major}, {minor}, 0)"
    return f"""case "$2" in *{missing}*) exit 1;; esac
exec {sys.executable} -c "{patch}
$2" """


class TestFindPython:
    def test_takes_the_first_that_runs_and_fits(self, tmp_path: Path) -> None:
        fake_python(tmp_path, "python3", "exit 127")
        fake_python(tmp_path, "python3.13", of_version(3, 14))
        fake_python(tmp_path, "python3.12", of_version(3, 12))
        fake_python(tmp_path, "python3.11", of_version(3, 11))
        assert find_python(tmp_path).stdout == "python3.12\n"

    @pytest.mark.parametrize(("minor", "fits"), [(10, False), (11, True), (12, True), (13, True), (14, False)])
    def test_versions(self, tmp_path: Path, minor: int, fits: bool) -> None:
        fake_python(tmp_path, "python3", of_version(3, minor))
        found = find_python(tmp_path)
        assert (found.returncode == 0) is fits
        assert ("no Python 3.11, 3.12 or 3.13 found" in found.stderr) is not fits

    def test_python_without_ensurepip_is_passed_over(self, tmp_path: Path) -> None:
        fake_python(tmp_path, "python3", of_version(3, 11, missing="ensurepip"))
        fake_python(tmp_path, "python3.13", of_version(3, 13))
        assert find_python(tmp_path).stdout == "python3.13\n"

    def test_no_python_can_make_an_environment(self, tmp_path: Path) -> None:
        fake_python(tmp_path, "python3", of_version(3, 11, missing="ensurepip"))
        found = find_python(tmp_path)
        assert found.returncode == 1
        assert "python3 has no venv" in found.stderr
        assert "apt install python3-venv" in found.stderr

    def test_a_python_that_was_named_is_the_only_candidate(self, tmp_path: Path) -> None:
        fake_python(tmp_path, "python3", of_version(3, 12))
        found = find_python(tmp_path, "python2.7")
        assert found.returncode == 1
        assert "tried: python2.7" in found.stderr

    def test_agrees_with_pyproject(self) -> None:
        (declared,) = re.findall(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())
        assert declared == ">=3.11,<3.14"
        for script in ("find_python.sh", "bootstrap.py"):
            assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in (ROOT / "scripts" / script).read_text()


class TestGpu:
    @pytest.mark.parametrize("trace", ["proc/driver/nvidia", "dev/nvidia0", "usr/lib/wsl/lib/libcuda.so.1"])
    def test_traces_of_the_driver(self, bootstrap: ModuleType, tmp_path: Path, trace: str) -> None:
        (tmp_path / trace).mkdir(parents=True)
        assert bootstrap.has_nvidia_gpu(tmp_path)

    @pytest.mark.parametrize(("exit_status", "has_gpu"), [(0, True), (9, False)])
    def test_nvidia_smi_must_find_one(
        self, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_status: int, has_gpu: bool
    ) -> None:
        fake_python(tmp_path, "nvidia-smi", f"exit {exit_status}")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert bootstrap.has_nvidia_gpu(tmp_path) is has_gpu

    def test_nothing_found(self, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert not bootstrap.has_nvidia_gpu(tmp_path)

    @pytest.mark.parametrize(
        ("choice", "platform", "has_gpu", "from_cpu_index"),
        [
            ("auto", "linux", False, True),
            ("auto", "linux", True, False),
            ("auto", "darwin", False, False),
            ("cpu", "linux", True, True),
            ("cuda", "linux", False, False),
        ],
    )
    def test_where_torch_comes_from(
        self, bootstrap: ModuleType, choice: str, platform: str, has_gpu: bool, from_cpu_index: bool
    ) -> None:
        assert bootstrap.wants_cpu_wheels(choice, platform, lambda: has_gpu) is from_cpu_index


class TestInstall:
    FAST = (TORCH, "--index-url", "https://download.pytorch.org/whl/cpu", "--retries", "0", "--timeout", "5")
    PATIENT = FAST[:3]

    def test_the_cpu_index_is_the_only_one_asked(self, bootstrap: ModuleType) -> None:
        pip = FakePip(True)
        bootstrap.install_torch(pip, TORCH, True)
        assert pip.calls == [[*self.FAST]]

    def test_with_a_gpu_the_default_index(self, bootstrap: ModuleType) -> None:
        pip = FakePip(True)
        bootstrap.install_torch(pip, TORCH, False)
        assert pip.calls == [[TORCH]]

    def test_an_unreachable_cpu_index_gives_way_at_once(self, bootstrap: ModuleType) -> None:
        pip = FakePip(False, True)
        bootstrap.install_torch(pip, TORCH, True, lambda _: False)
        assert pip.calls == [[*self.FAST], [TORCH]]

    def test_a_broken_download_is_tried_again_before_the_cuda_build(self, bootstrap: ModuleType) -> None:
        pip = FakePip(False, True)
        bootstrap.install_torch(pip, TORCH, True, lambda _: True)
        assert pip.calls == [[*self.FAST], [*self.PATIENT]]

    def test_no_torch_anywhere(self, bootstrap: ModuleType) -> None:
        with pytest.raises(bootstrap.BootstrapError, match="cannot install torch"):
            bootstrap.install_torch(FakePip(False, False, False), TORCH, True, lambda _: True)

    def test_a_closed_port_is_unreachable(self, bootstrap: ModuleType) -> None:
        assert not bootstrap.is_reachable("http://127.0.0.1:9/torch/")

    def test_the_project_cannot_move_torch(self, bootstrap: ModuleType) -> None:
        held = []

        def pip(arguments: Sequence[str]) -> bool:
            held.append(Path(arguments[1]).read_text())
            return list(arguments[2:]) == ["--editable", "."]

        bootstrap.install_project(pip, "2.13.0+cpu", ["--editable", "."])
        assert held == ["torch==2.13.0+cpu\n"]

    def test_pyproject_names_torch_once(self, bootstrap: ModuleType) -> None:
        assert bootstrap.torch_requirement(bootstrap.dependencies()) == TORCH


class TestEnvironment:
    def test_a_broken_one_is_made_anew(self, bootstrap: ModuleType, tmp_path: Path) -> None:
        folder = tmp_path / "venv"
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(tmp_path / "gone")
        python = bootstrap.ensure_venv(folder)
        done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
        assert str(folder) in done.stdout

    def test_another_version_is_refused(self, bootstrap: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "bin").mkdir()
        fake_python(tmp_path / "bin", "python", of_version(3, 10))
        with pytest.raises(bootstrap.BootstrapError, match="remove it and try again"):
            bootstrap.ensure_venv(tmp_path)


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    # what the make that runs these tests was told is not for this one
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment["PATH"] = path or os.environ["PATH"]
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_make_says_what_is_missing(tmp_path: Path) -> None:
    for tool in ("make", "sh"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = make("serve", f"VENV={tmp_path}/venv", path=str(tmp_path))
    assert done.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 found" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_every_target_is_in_the_help() -> None:
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    shown = make("help").stdout
    assert {"serve", "test", "check"} <= set(targets)
    assert [target for target in targets if not re.search(rf"\b{target}\b", shown)] == []
