"""Makes the virtual environment and installs the project into it; standard library only, run by the Makefile.

torch comes first and alone, because where it comes from depends on the machine: without an NVIDIA GPU from PyTorch's
CPU wheels (a tenth of the download), otherwise, and where that index cannot be reached, from pip's default index.
Everything else follows with torch held at the version that is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONNECT_SECONDS = 5

# the driver's own traces, and that of the Windows driver inside WSL
GPU_TRACES = ("proc/driver/nvidia", "dev/nvidia0", "usr/lib/wsl/lib/libcuda.so.1")

Pip = Callable[[Sequence[str]], bool]


class BootstrapError(Exception):
    """The environment cannot be made; the message tells the user what to do."""


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine shows an NVIDIA GPU, by the driver's traces below ``root`` or by ``nvidia-smi``."""
    if any((root / trace).exists() for trace in GPU_TRACES):
        return True
    return shutil.which("nvidia-smi") is not None and _runs(["nvidia-smi", "-L"])


def wants_cpu_wheels(choice: str, platform: str, has_gpu: Callable[[], bool] = has_nvidia_gpu) -> bool:
    """Whether torch is to come from the CPU index; ``choice`` is auto, cpu or cuda. macOS has no other build."""
    if choice == "auto":
        return platform == "linux" and not has_gpu()
    return choice == "cpu"


def is_reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS):
            return True
    except (OSError, urllib.error.URLError):
        return False


def install_torch(
    pip: Pip, requirement: str, from_cpu_index: bool, reachable: Callable[[str], bool] = is_reachable
) -> None:
    """Install torch alone. Raises BootstrapError when no index has it."""
    cpu_wheels = [requirement, "--index-url", CPU_INDEX]
    if from_cpu_index:
        if pip([*cpu_wheels, "--retries", "0", "--timeout", str(CONNECT_SECONDS)]):
            return
        # a stumble half-way is no reason to download the CUDA build
        if reachable(f"{CPU_INDEX}/torch/") and pip(cpu_wheels):
            return
        _say(f"{CPU_INDEX} gives no torch; taking it from pip's default index")
    if not pip([requirement]):
        raise BootstrapError(f"cannot install {requirement}: pip's message above says why")


def dependencies(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    with pyproject.open("rb") as file:
        return list(tomllib.load(file)["project"]["dependencies"])


def torch_requirement(requirements: list[str]) -> str:
    (found,) = (line for line in requirements if line.startswith("torch>"))
    return found


def install_project(pip: Pip, torch_version: str, what: Sequence[str]) -> None:
    """Install ``what``, pip arguments, without touching torch. Raises BootstrapError."""
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "constraints.txt"
        constraint.write_text(f"torch=={torch_version}\n")
        if not pip(["--constraint", str(constraint), *what]):
            raise BootstrapError("cannot install the project: pip's message above says why")


def ensure_venv(folder: Path) -> Path:
    """Make the environment, or mend one whose interpreter or pip is gone. Returns its Python."""
    python = folder / "bin" / "python"
    if not _runs([str(python), "-c", ""]):
        _say(f"making {folder}")
        _check([sys.executable, "-m", "venv", "--clear", str(folder)], f"cannot make {folder}")
    if not _runs([str(python), "-c", "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))"]):
        raise BootstrapError(f"{folder} holds another Python than 3.11, 3.12 or 3.13: remove it and try again")
    if not _runs([str(python), "-m", "pip", "--version"]):
        _check([str(python), "-m", "ensurepip"], f"{folder} has no pip")
    return python


def pip_of(python: Path) -> Pip:
    # an environment is never a --user install, whatever the user's configuration says
    environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def install(arguments: Sequence[str]) -> bool:
        command = [str(python), "-m", "pip", "install", *arguments]
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode == 0

    return install


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the virtual environment and install the project into it.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv of the project)")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml; may be repeated")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto", help="which build of torch")
    parser.add_argument("--dependencies-only", action="store_true", help="leave the project itself out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    extras = f"[{','.join(options.extra)}]" if options.extra else ""
    requirements = dependencies()
    try:
        python = ensure_venv(options.venv)
        pip = pip_of(python)
        install_torch(pip, torch_requirement(requirements), wants_cpu_wheels(options.torch, sys.platform))
        what = requirements if options.dependencies_only else ["--editable", f"{ROOT}{extras}"]
        install_project(pip, _version_of_torch(python), what)
    except BootstrapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _version_of_torch(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _check(command: Sequence[str], problem: str) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
        raise BootstrapError(problem)


def _say(line: str) -> None:
    print(f"bootstrap: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
