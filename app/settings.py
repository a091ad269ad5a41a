"""Every setting of the service: as a flag, an environment variable and a key of a YAML file."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from app.keys import ApiKey, KeyLimits, join_keys, parse_key, parse_keys

ENV_PREFIX = "MAMBA_"
BUILT_IN_TEMPLATES = ("chatml",)
# other programs have variables that begin as ours do, so only a near miss is taken for a mistake
_NEARLY_OURS = 0.88
_ROOT_PATH = re.compile(r"(/[\w.~%-]+)*", re.ASCII)
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#A-Z]+")


class SettingsError(Exception):
    """A setting is wrong; the message is one line for the operator."""


def _setting(default: Any, group: str, description: str, **constraints: Any) -> Any:
    """A field with the group and the sentence that ``--help`` shows."""
    return Field(default, description=description, json_schema_extra={"group": group}, **constraints)


def _split(value: Any) -> Any:
    """A list given as one string: a JSON array, or values separated by commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError("not a JSON array") from error
    return [part.strip() for part in value.split(",")]


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


def _template_name(name: str) -> str:
    if name not in BUILT_IN_TEMPLATES and not Path(name).expanduser().is_file():
        raise ValueError(f"no such file, nor one of the built-in templates ({', '.join(BUILT_IN_TEMPLATES)}): {name}")
    return name


def _looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id is ``name`` or ``owner/name``."""
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1


def _directory_or_hub_id(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ValueError(f"not a directory: {name}")
    if _looks_like_path(name):
        raise ValueError(f"no such directory: {name}")
    return name


def _not_a_bool(value: Any) -> Any:
    """YAML's ``port: yes`` is a mistake, not the number 1."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


def _origin(value: str) -> str:
    if _ORIGIN.fullmatch(value) is None:
        raise ValueError("an origin is *, or a scheme and a host without a path: https://example.com")
    return value


def _split_each(value: Any) -> Any:
    """The same of each string where there are several, as flags have them."""
    if not isinstance(value, (list, tuple)):
        return _split(value)
    parts = [_split(part) for part in value]
    return [each for part in parts for each in (part if isinstance(part, list) else [part])]


def _root_path(value: str) -> str:
    path = value.rstrip("/")
    if _ROOT_PATH.fullmatch(path) is None:
        raise ValueError("a path begins with a slash, and holds letters, digits and any of . _ ~ % - between slashes")
    return path


NonEmpty = Annotated[str, Field(min_length=1)]
DirectoryOrHubId = Annotated[NonEmpty, AfterValidator(_directory_or_hub_id)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split_each)]
Names = Annotated[tuple[NonEmpty, ...], NoDecode, BeforeValidator(_split_each)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
RootPath = Annotated[str, AfterValidator(_root_path)]
TemplateName = Annotated[NonEmpty, AfterValidator(_template_name)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_not_a_bool)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_not_a_bool)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_not_a_bool)]
NumberOrZero = Annotated[int, Field(ge=0), BeforeValidator(_not_a_bool)]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class Settings(BaseSettings):
    """What an operator decides. Flags win over ``MAMBA_...`` variables, those over the YAML file, that over defaults.

    Raises pydantic's ValidationError when built directly; ``load`` turns that into one line.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=False)

    model: DirectoryOrHubId = _setting(
        ..., "Model", "directory or hub id of the checkpoint; also accepted as the argument"
    )
    tokenizer: DirectoryOrHubId | None = _setting(
        None, "Model", "directory or hub id of the tokenizer, if the model has none of its own"
    )
    revision: NonEmpty | None = _setting(None, "Model", "branch, tag or commit of a hub id")
    served_model_name: Names = _setting(
        (),
        "Model",
        "names that requests may use; the first one is answered (default: the hub id, or the directory's last part)",
    )
    chat_template: TemplateName | None = _setting(
        None,
        "Model",
        "file with the Jinja template of conversations, or chatml (default: the checkpoint's own, if any)",
    )
    enable_chat_template_kwargs: bool = _setting(
        False, "Model", "requests may set variables of the chat template (chat_template_kwargs)"
    )
    max_model_len: Count | None = _setting(None, "Model", "most tokens of prompt plus output; none when not given")

    device: str = _setting("auto", "Engine", "auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "Engine", "type of the weights; auto is bfloat16 on a GPU and on a CPU that multiplies it, else float32"
    )
    quantization: Literal["none", "int8"] = _setting(
        "none", "Engine", "int8: the large matrices in int8 with a scale per output, half the memory of bfloat16"
    )
    state_dtype: Literal["float32", "bfloat16", "float16"] = _setting(
        "float32", "Engine", "type of the recurrent state; lower ones halve the memory per sequence"
    )
    max_num_seqs: Count | None = _setting(None, "Engine", "sequences that run at once; from memory when not given")
    prefill_budget: Count | None = _setting(None, "Engine", "most prompt tokens taken into one step")
    memory_fraction: Annotated[float, BeforeValidator(_not_a_bool)] = _setting(
        0.5, "Engine", "share of the free device memory that states may take", gt=0, le=1, allow_inf_nan=False
    )
    num_threads: Count | None = _setting(
        None, "Engine", "CPU threads of the engine; one for each core it may use when not given"
    )
    cuda_graphs: bool = _setting(True, "Engine", "false: decode steps on a GPU are launched kernel by kernel, slowly")

    host: NonEmpty = _setting("127.0.0.1", "Server", "address to listen on; 0.0.0.0 for every interface")
    port: Annotated[int, BeforeValidator(_not_a_bool)] = _setting(
        8000, "Server", "port; 0 for a free one", ge=0, le=65535
    )
    root_path: RootPath = _setting("", "Server", "path under which a proxy serves this, such as /llm")
    api_key: Secrets = _setting(
        (), "Server", "keys of which a request must carry one, each KEY or 'NAME = KEY'; open when none is given"
    )
    api_key_file: ExistingFile | None = _setting(
        None, "Server", "file with more keys, one a line, limits of its own behind each; read again on SIGHUP"
    )
    allowed_origins: Origins = _setting(
        (), "Server", "origins of web pages that may call this, or * for all (CORS); none when not given"
    )
    allowed_methods: Names = _setting(("*",), "Server", "methods that such pages may use")
    allowed_headers: Names = _setting(("*",), "Server", "headers that such pages may send")
    allow_credentials: bool = _setting(False, "Server", "such pages may send cookies and the like")
    disable_docs: bool = _setting(False, "Server", "no /docs and no /openapi.json")
    open_docs: bool = _setting(False, "Server", "/docs and /openapi.json need no key")
    disable_metrics: bool = _setting(False, "Server", "no /metrics")
    protect_metrics: bool = _setting(False, "Server", "/metrics needs a key as well")

    max_queue: NumberOrZero = _setting(
        256, "Limits", "sequences that may wait beside those that run; more are refused with 429"
    )
    max_queue_tokens: Count = _setting(2_000_000, "Limits", "prompt tokens that may wait; more are refused with 429")
    max_body_size: Annotated[ByteSize, BeforeValidator(_not_a_bool)] = _setting(
        ByteSize(16 * 2**20), "Limits", "largest request body, in bytes or as 16MiB", ge=1
    )
    max_prompts: Count = _setting(128, "Limits", "prompts in one request")
    max_n: Count = _setting(64, "Limits", "continuations of one prompt (n, best_of)")
    max_stored_responses: NumberOrZero = _setting(
        1000, "Limits", "responses kept in memory to go on after; those not used for longest give way; 0 for none"
    )
    max_stored_bytes: Annotated[ByteSize, BeforeValidator(_not_a_bool)] = _setting(
        ByteSize(64 * 2**20), "Limits", "bytes that these take together, or as 64MiB", ge=1
    )
    key_max_concurrency: NumberOrZero = _setting(
        0, "Limits", "requests that may be open at once under one key's name; 0 for no limit"
    )
    key_requests_per_minute: NumberOrZero = _setting(
        0, "Limits", "requests under one key's name in any 60 seconds; 0 for no limit"
    )
    key_tokens_per_minute: NumberOrZero = _setting(
        0,
        "Limits",
        "tokens of prompts and answers under one key's name in any 60 seconds, counted when a request is over; "
        "0 for no limit",
    )
    max_connections: Count = _setting(4096, "Limits", "open connections; more are refused with 503")
    header_timeout: PositiveSeconds = _setting(10.0, "Limits", "seconds for the headers of a request to arrive")
    body_timeout: PositiveSeconds = _setting(60.0, "Limits", "seconds for the body of a request to arrive")
    max_request_seconds: Seconds = _setting(
        0.0, "Limits", "seconds that a request for tokens may take, whatever X-Request-Timeout asks for; 0 for no limit"
    )
    write_timeout: PositiveSeconds = _setting(60.0, "Limits", "seconds after which a client that reads nothing is cut")
    ping_interval: PositiveSeconds = _setting(15.0, "Limits", "seconds of silence in a stream before a comment is sent")
    heartbeat_timeout: PositiveSeconds = _setting(
        30.0, "Limits", "seconds of one engine step after which the server is not ready; after twice that, not live"
    )

    drain_delay: Seconds = _setting(
        0.0, "Shutdown", "seconds after SIGTERM during which the port stays open at least, answering 503"
    )
    shutdown_timeout: Seconds = _setting(30.0, "Shutdown", "seconds that open requests get to finish after SIGTERM")

    log_format: Literal["console", "json"] = _setting("console", "Logging", "lines for people or for machines")
    log_level: LogLevel = _setting("info", "Logging", "least level that is logged")
    uvicorn_log_level: LogLevel = _setting("warning", "Logging", "least level that the HTTP server below logs")
    disable_access_log: bool = _setting(False, "Logging", "no line per request")
    config: ExistingFile | None = _setting(None, "Logging", "YAML file with any of these settings")

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in keys:
            text = key.get_secret_value().strip()
            if text[:1] + text[-1:] == "[]":
                raise ValueError("a key in brackets looks like a list; give each key as a value of its own")
            parse_key(text)
        return keys

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names under which the model is served, each once, the answered one first."""
        own_name = Path(self.model).resolve().name if Path(self.model).is_dir() else self.model
        return tuple(dict.fromkeys(self.served_model_name)) or (own_name,)

    def read_api_keys(self) -> tuple[ApiKey, ...]:
        """All keys, those of the file included. Raises SettingsError when the file holds none or a broken one."""
        limits = KeyLimits(self.key_max_concurrency, self.key_requests_per_minute, self.key_tokens_per_minute)
        keys = [parse_key(key.get_secret_value(), limits, f"key-{i}") for i, key in enumerate(self.api_key, 1)]
        if self.api_key_file is not None:
            keys += _read_key_file(self.api_key_file, limits, len(keys) + 1)
        try:
            return join_keys(keys)
        except ValueError as error:
            setting = "--api-key" if self.api_key_file is None else "--api-key-file"
            raise SettingsError(f"{setting}: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the signature is pydantic-settings')
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file that one of the two names."""
        config = init_settings().get("config") or env_settings().get("config")
        file_settings = read_config(Path(config)) if config else {}
        return init_settings, env_settings, InitSettingsSource(settings_cls, file_settings)


def load(flags: dict[str, Any]) -> Settings:
    """The settings from flags, environment and file. Raises SettingsError, whose message is one line."""
    _check_environment()
    try:
        settings = Settings(**flags)
    except ValidationError as error:
        raise SettingsError("; ".join(_describe(dict(problem)) for problem in error.errors())) from None
    settings.read_api_keys()
    return settings


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, dashes as underscores. Raises SettingsError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config: {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config: {path} should hold one mapping of settings")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in settings:
        if key not in Settings.model_fields or key == "config":
            raise SettingsError(f"--config: {path}: unknown key {key!r}{_suggest(key, list(Settings.model_fields))}")
    return settings


def flag_name(field: str) -> str:
    """``max_num_seqs`` as ``--max-num-seqs``."""
    return "--" + field.replace("_", "-")


def _describe(problem: dict[str, Any]) -> str:
    field = str(problem["loc"][0])
    if field == "model" and problem["type"] == "missing":
        return "no model given: mamba-serve MODEL, or --model"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list of values")
    given = (
        "" if field == "api_key" or problem["type"] == "value_error" else f" (given: {str(problem['input'])[:80]!r})"
    )
    hint = ""
    if str(problem["input"]).startswith("tcp://"):
        hint = "; Kubernetes sets such variables for a Service named 'mamba' unless enableServiceLinks is false"
    return f"{flag_name(field)}: {message}{given}{hint}"


def _check_environment() -> None:
    """A variable that is nearly one of ours is a mistake: a misspelt MAMBA_API_KEY would leave the server open."""
    known = [ENV_PREFIX + field.upper() for field in Settings.model_fields]
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and name not in known and (hint := _suggest(name, known, _NEARLY_OURS)):
            raise SettingsError(f"unknown environment variable {name}{hint}")


def _suggest(name: str, known: list[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def _read_key_file(path: Path, limits: KeyLimits, first_number: int) -> list[ApiKey]:
    try:
        # with the mark that some editors put at a file's beginning
        keys = parse_keys(path.read_text(encoding="utf-8-sig").splitlines(), limits, first_number)
    except UnicodeDecodeError:
        raise SettingsError(f"--api-key-file: {path} is not text in UTF-8") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--api-key-file: {path}: {error}") from None
    if not keys:
        raise SettingsError(f"--api-key-file: {path} holds no key")
    return keys
