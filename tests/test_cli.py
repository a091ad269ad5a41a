"""The command line: help, version, and exit code 2 with one line before anything loads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ByteSize

from app import __version__
from app.cli import build_parser, main, parse
from app.engine.config import EngineConfig
from app.main import engine_config
from app.settings import Settings, SettingsError, flag_name


def test_help_tells_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f" {flag_name(name)}" in text
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            default = field.default.human_readable() if isinstance(field.default, ByteSize) else field.default
            assert f"(default: {default})" in text
    for group in ("Model:", "Engine:", "Server:", "Limits:", "Shutdown:", "Logging:"):
        assert group in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mamba-serve {__version__}\n"


def test_the_model_as_argument_and_as_flag() -> None:
    assert parse(["a/b"]).model == "a/b"
    assert parse(["--model", "a/b"]).model == "a/b"
    assert parse(["a/b", "--port", "0"]).port == 0
    with pytest.raises(SettingsError, match="twice"):
        parse(["a/b", "--model", "c/d"])


def test_lists_and_switches() -> None:
    settings = parse(["a/b", "--api-key", "k1", "k2", "--api-key", "k3", "--disable-metrics"])
    assert [key.secret for key in settings.read_api_keys()] == ["k1", "k2", "k3"]
    assert settings.disable_metrics
    assert not parse(["a/b", "--no-disable-metrics"]).disable_metrics


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a/b", "--prot", "1"],
        ["a/b", "--por", "1"],
        ["a/b", "c/d"],
        ["a/b", "--port"],
        ["a/b", "--port", "-1"],
        ["/does/not/exist"],
        ["a/b", "--config", "/nothing.yaml"],
    ],
)
def test_wrong_settings(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mamba-serve: error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("module", ["app", "app.cli"])
def test_a_wrong_setting_is_told_before_anything_loads(module: str) -> None:
    code = f"import runpy, sys; sys.argv = ['x', '/nothing']; runpy.run_module('{module}', run_name='__main__')"
    watch = (
        f"import atexit, sys; atexit.register(lambda: print(sorted({{'torch', 'uvicorn'}} & set(sys.modules)))); {code}"
    )
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "mamba-serve: error: --model: no such directory: /nothing\n"
    assert done.stdout == "[]\n"


def test_the_engine_is_told_what_was_set() -> None:
    flags = {"--dtype": "float16", "--state-dtype": "bfloat16", "--device": "cuda:1", "--max-num-seqs": "7"}
    settings = parse(["a/b", *(word for flag in flags.items() for word in flag)])
    assert engine_config(settings) == EngineConfig(
        "a/b", dtype="float16", state_dtype="bfloat16", device="cuda:1", max_num_seqs=7
    )
    fields = set(EngineConfig.__dataclass_fields__)
    assert fields <= set(Settings.model_fields), "an engine setting that nobody can set"
    for name in fields - {"model"}:
        assert getattr(engine_config(parse(["a/b"])), name) == EngineConfig.__dataclass_fields__[name].default


def test_no_flag_can_be_shortened() -> None:
    assert build_parser().allow_abbrev is False


@pytest.mark.parametrize(
    ("content", "message"), [("{% for x in %}", "not valid: .*line 1"), (" \n", "holds no chat template")]
)
def test_a_template_that_cannot_be_used_is_a_wrong_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(content)
    assert main(["a/b", "--chat-template", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"--chat-template: .*{message}", line)
    path.write_text("{{ messages }}")
    assert parse(["a/b", "--chat-template", str(path)]).chat_template == str(path)
