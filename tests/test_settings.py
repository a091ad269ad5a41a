"""One class of settings from three sources, and one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.keys import ApiKey, KeyLimits
from app.settings import Settings, SettingsError, load


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("MAMBA_"):
            monkeypatch.delenv(name)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "mamba.yaml"
    config.write_text("model: from/file\nport: 1\nmax-queue: 1\nmax_n: 1\nserved-model-name: [a, b]\n")
    monkeypatch.setenv("MAMBA_PORT", "2")
    monkeypatch.setenv("MAMBA_MAX_QUEUE", "2")
    settings = load({"config": str(config), "port": "3"})
    assert (settings.port, settings.max_queue, settings.max_n, settings.max_prompts) == (3, 2, 1, 128)
    assert settings.model == "from/file"
    assert settings.model_names == ("a", "b")
    monkeypatch.setenv("MAMBA_CONFIG", str(config))
    assert load({}).max_n == 1


def test_lists_in_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBA_MODEL", "a/b")
    monkeypatch.setenv("MAMBA_SERVED_MODEL_NAME", "x, y")
    monkeypatch.setenv("MAMBA_API_KEY", '["k,1", "k2"]')
    settings = load({})
    assert settings.model_names == ("x", "y")
    assert [key.secret for key in settings.read_api_keys()] == ["k,1", "k2"]
    assert "k2" not in repr(settings)
    assert "k2" not in repr(settings.read_api_keys())


@pytest.mark.parametrize("names", [["x", "y"], ["x", "y", "x"], ["x,y"], ["x, y"], ['["x", "y"]'], "x,y"])
def test_lists_in_flags(names: object) -> None:
    settings = load({"model": "a/b", "served_model_name": names})
    assert settings.model_names == ("x", "y")
    origins = ["https://a.example,https://b.example"]
    assert load({"model": "a/b", "allowed_origins": origins}).allowed_origins == tuple(origins[0].split(","))
    # a key may hold a comma
    (key,) = load({"model": "a/b", "api_key": ["k,1"]}).read_api_keys()
    assert key.secret == "k,1"


@pytest.mark.parametrize(("given", "path"), [("/", ""), ("/llm/", "/llm"), ("/llm/v2", "/llm/v2"), ("", "")])
def test_root_paths(given: str, path: str) -> None:
    assert load({"model": "a/b", "root_path": given}).root_path == path


def test_names_of_a_directory_and_of_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert load({"model": str(tmp_path / "tiny")}).model_names == ("tiny",)
    assert load({"model": "acme/fox"}).model_names == ("acme/fox",)


def test_keys_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n# ours\nsk-1\n  alice = sk-2  \n\nsk-1\nbatch = sk-3 max-concurrency=2 tokens-per-minute=0\n")
    settings = load(
        {
            "model": "a/b",
            "api_key": ["sk-0", "#sk"],
            "api_key_file": str(keys),
            "key_requests_per_minute": "60",
            "key_tokens_per_minute": "5",
        }
    )
    usual = KeyLimits(requests_per_minute=60, tokens_per_minute=5)
    assert settings.read_api_keys() == (
        ApiKey("sk-0", "key-1", usual),
        ApiKey("#sk", "key-2", usual),
        ApiKey("sk-1", "key-3", usual),
        ApiKey("sk-2", "alice", usual),
        ApiKey("sk-3", "batch", KeyLimits(max_concurrency=2, requests_per_minute=60)),
    )


@pytest.mark.parametrize(("content", "names"), [(b"\xef\xbb\xbfalice = k\r\n", ["alice"]), (b"\xff = k", None)])
def test_bytes_of_a_key_file(tmp_path: Path, content: bytes, names: list[str] | None) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(content)
    if names is None:
        with pytest.raises(SettingsError, match="UTF-8"):
            load({"model": "a/b", "api_key_file": str(keys)})
    else:
        read = load({"model": "a/b", "api_key_file": str(keys)}).read_api_keys()
        assert [key.name for key in read] == names


def test_a_key_in_brackets_is_a_key_in_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("[sk]\n")
    read = load({"model": "a/b", "api_key_file": str(keys)}).read_api_keys()
    assert [key.secret for key in read] == ["[sk]"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# none\n", ["holds no key"]),
        ("sk-1\nsk-secret with spaces", ["line 2", "max-concurrency=N"]),
        ("alice = sk-secret 5", ["line 1"]),
        ("alice = sk-secret max-concurrency=-1", ["line 1"]),
        ("alice = sk-secret max-concurrency=1 max-concurrency=2", ["once"]),
        ("alice = sk-secret max-anything=1", ["line 1"]),
        ("alice =", ["line 1", "empty"]),
        ("al/ice = sk-secret", ["name"]),
        ("key-7 = sk-secret", ["name"]),
        ("sk-secr\u00e9t", ["ASCII"]),
        ("alice = sk-secret\nbob = sk-secret", ["'alice'", "'bob'", "same key"]),
        ("alice = sk-secret\nalice = sk-2 max-concurrency=3", ["'alice'", "different limits"]),
    ],
)
def test_wrong_key_files(tmp_path: Path, text: str, words: list[str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load({"model": "a/b", "api_key_file": str(keys)})
    message = str(caught.value)
    assert message.startswith("--api-key-file: ")
    assert all(word in message for word in words), message
    assert "secr" not in message.replace(str(keys), "")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, ["no model"]),
        ({"model": ""}, ["--model"]),
        ({"model": "/does/not/exist"}, ["--model", "no such directory"]),
        ({"model": "./nothing"}, ["--model", "no such directory"]),
        ({"model": __file__}, ["--model", "not a directory"]),
        ({"model": "a/b", "tokenizer": "/nothing"}, ["--tokenizer"]),
        ({"model": "a/b", "port": "70000"}, ["--port", "65535", "70000"]),
        ({"model": "a/b", "port": "x"}, ["--port", "integer"]),
        ({"model": "a/b", "port": "8000.5"}, ["--port"]),
        ({"model": "a/b", "dtype": "half"}, ["--dtype", "bfloat16"]),
        ({"model": "a/b", "device": "tpu"}, ["--device"]),
        ({"model": "a/b", "max_num_seqs": "0"}, ["--max-num-seqs"]),
        ({"model": "a/b", "memory_fraction": "nan"}, ["--memory-fraction"]),
        ({"model": "a/b", "memory_fraction": "1.5"}, ["--memory-fraction"]),
        ({"model": "a/b", "shutdown_timeout": "-1"}, ["--shutdown-timeout"]),
        ({"model": "a/b", "max_body_size": "10 apples"}, ["--max-body-size"]),
        ({"model": "a/b", "root_path": "no/slash"}, ["--root-path", "begins with a slash"]),
        ({"model": "a/b", "root_path": "/a b"}, ["--root-path"]),
        ({"model": "a/b", "root_path": "/a//b"}, ["--root-path"]),
        ({"model": "a/b", "api_key": ["alice = sk-secret", "bob = sk-secret"]}, ["--api-key: ", "same key"]),
        ({"model": "a/b", "api_key": 5}, ["--api-key", "list"]),
        ({"model": "a/b", "api_key": [""]}, ["--api-key", "everybody"]),
        ({"model": "a/b", "api_key": ["sk spaced"]}, ["--api-key"]),
        ({"model": "a/b", "api_key": ['["sk-one", "sk-two"]']}, ["--api-key", "each key"]),
        ({"model": "a/b", "api_key_file": "/nothing"}, ["--api-key-file", "/nothing"]),
        ({"model": "a/b", "config": "/nothing.yaml"}, ["--config", "/nothing.yaml"]),
        ({"model": "a/b", "log_format": "xml"}, ["--log-format"]),
    ],
)
def test_wrong_flags(flags: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 8000", ["'prot'", "did you mean port"]),
        ("whatever: 1", ["'whatever'"]),
        ("config: other.yaml", ["'config'"]),
        ("port: true", ["--port", "true"]),
        ("port: [8000]", ["--port"]),
        ("model: 5", ["--model", "string"]),
        ("disable_metrics: maybe", ["--disable-metrics"]),
        ("- a\n- b", ["mapping"]),
        ("port: {", ["not YAML"]),
        ("api_key: ['']", ["--api-key"]),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: list[str]) -> None:
    config = tmp_path / "mamba.yaml"
    config.write_text(text)
    flags: dict[str, object] = {"config": str(config)}
    if "model" not in text:
        flags["model"] = "a/b"
    with pytest.raises(SettingsError) as caught:
        load(flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "mamba.yaml"
    config.write_text("# nothing yet\n")
    assert load({"model": "a/b", "config": str(config)}).port == 8000


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MAMBA_API_KEYS", "sk", ["MAMBA_API_KEYS", "MAMBA_API_KEY?"]),
        ("MAMBA_API_KEY", "", ["--api-key"]),
        ("MAMBA_API_KEY", "[sk-one, sk-two]", ["--api-key", "JSON array"]),
        ("MAMBA_API_KEY", "sk-one, [sk-two]", ["--api-key", "each key"]),
        ("MAMBA_PORT", "tcp://10.0.0.1:8000", ["--port", "enableServiceLinks"]),
        ("MAMBA_DTYPE", "", ["--dtype"]),
    ],
)
def test_wrong_variables(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load({"model": "a/b"})
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBA_ROOT_PREFIX", "/opt/micromamba")
    monkeypatch.setenv("MAMBA_EXE", "/bin/micromamba")
    assert load({"model": "a/b"}).root_path == ""


def test_a_key_that_is_wrong_is_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"model": "a/b", "api_key": ["sk-secret with spaces"]})
    assert "secret" not in str(caught.value)


def test_every_setting_tells_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict)
        assert field.json_schema_extra["group"], name
