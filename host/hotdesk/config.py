"""Settings: flags over `HOTDESK_*` environment over `hotdesk.toml` over defaults.

Owns every read of the environment and of the settings file. A wrong setting is a `ConfigError` with the
setting's name, the value, where it came from and what would be right.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from .errors import ConfigError

__all__ = [
    "LLM_SETTINGS",
    "RESERVED",
    "Config",
    "LlmSettings",
    "ModelSettings",
    "PluginSettings",
    "load_config",
    "read_llm_settings",
    "read_plugin_settings",
]

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]


REDIS_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")


class PluginSettings(msgspec.Struct, frozen=True):
    """What the operator says of one plugin in `[plugins.NAME]`; all other keys there are the plugin's own config."""

    enabled: bool = True
    order: int | None = None
    timeout_ms: Positive | None = None
    on_failure: Literal["skip", "refuse"] | None = None
    grant: tuple[str, ...] = ()
    config: dict[str, Any] = {}


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One language model: `[llm]`, or `[llm.models.NAME]`, which takes from `[llm]` what it does not say itself.

    host/README.md has a row for each; a test compares the two.
    """

    base_url: str = ""
    api_key: str = ""
    model: str = "gpt-4.1-mini"
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Positive | None = None
    headers: dict[str, str] = {}
    body: dict[str, Any] = {}
    api_version: str = ""
    proxy: str = ""
    vision: bool = True
    usage_in_streams: bool = True
    connect_s: Seconds = 5.0
    first_token_s: Seconds = 30.0
    gap_s: Seconds = 15.0
    total_s: Seconds = 300.0
    retries: NotNegative = 2
    concurrency: Positive = 1024
    queue: NotNegative = 1024
    price_in: Annotated[float, Meta(ge=0)] = 0.0
    price_out: Annotated[float, Meta(ge=0)] = 0.0

    def __repr__(self) -> str:
        return f"<model {self.model!r} at {self.base_url or 'the default URL'}>"  # no key, no headers: it may be logged


class LlmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The language models by name; the first is the one that answers, `fallback` those tried after it, in order."""

    models: dict[str, ModelSettings] = {}
    fallback: tuple[str, ...] = ()
    grant: tuple[str, ...] = ("chatgpt",)
    """Plugins that are granted the capability `llm` here."""

    key_from: str = ""
    """Which setting or variable the first model's key came from."""

    environ: dict[str, str] = {}
    """The variables that were looked at, for when the file is read again."""

    def __repr__(self) -> str:
        return f"<{len(self.models)} language models>"  # no key: it may be logged


LLM_SETTINGS: tuple[str, ...] = ModelSettings.__struct_fields__

RESERVED = frozenset({"enabled", "order", "timeout_ms", "on_failure", "grant"})
"""The keys of `[plugins.NAME]` that speak to the host and not to the plugin."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting with its default. host/README.md has a row for each; a test compares the two."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    plugins: tuple[str, ...] = ("plugins",)
    data: str = "data"
    backend: str = ""
    workers: Positive = 1
    spool: bool = False
    spool_mb: Positive = 64
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_text: bool = False
    admin_token: str = ""
    allowed_origins: tuple[str, ...] = ()
    visitor_tokens: bool = False
    visitor_secret: str = ""
    visitor_token_s: Positive = 3600
    max_turns: Positive = 2048
    max_tries: Annotated[int, Meta(ge=3)] = 5
    max_body_bytes: Positive = 8 * 1024 * 1024
    max_text_bytes: Positive = 128 * 1024
    max_image_bytes: Positive = 5 * 1024 * 1024
    image_hosts: tuple[str, ...] = ()
    http_hosts: tuple[str, ...] = ()
    max_reply_chars: Positive = 1024 * 1024
    max_buffer_bytes: Positive = 512 * 1024
    reader_stall_s: Seconds = 20.0
    on_leave: Literal["finish", "cancel"] = "finish"
    rate_per_minute: NotNegative = 0
    rate_burst: Positive = 10
    watch: Literal["auto", "pending", "frozen"] = "auto"
    watch_poll: bool = False
    setup_timeout_s: Seconds = 10.0
    drain_timeout_s: Seconds = 30.0
    stop_timeout_s: Seconds = 10.0
    probation_calls: NotNegative = 20
    standby_s: Annotated[float, Meta(ge=0)] = 1.0
    keep_generations: Positive = 5
    breaker_failures: Annotated[int, Meta(ge=1, le=20)] = 10
    breaker_cooldown_s: Seconds = 5.0
    stall_ms: Positive = 100
    wasm_instances: Positive = 8
    wasm_memory_mb: Annotated[int, Meta(ge=1, le=4095)] = 64
    wasm_output_bytes: Positive = 4 * 1024 * 1024
    wasm_cache: str = ""
    wasm_cache_mb: Positive = 1024
    wasm_baseline: bool = True
    wasm_compile_mb: Annotated[int, Meta(ge=256)] = 2048
    wasm_compile_timeout_s: Seconds = 60.0
    retention_days: NotNegative = 0
    plugin_settings: dict[str, PluginSettings] = {}
    llm: LlmSettings = LlmSettings()
    file: str | None = None

    @property
    def backend_url(self) -> str:
        return self.backend or f"sqlite:///{Path(self.data) / 'hotdesk.db'}"


SETTINGS: tuple[str, ...] = tuple(
    name for name in Config.__struct_fields__ if name not in ("plugin_settings", "llm", "file")
)
_TYPES = {field.name: field.type for field in msgspec.structs.fields(Config)}


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str], *, file: str | None = None) -> Config:
    """Put the settings together. *flags* that are None were not given; *file* that is None is `hotdesk.toml` if there.

    Relative paths in the file are relative to the file. Raises `ConfigError`.
    """
    file = file or environ.get("HOTDESK_CONFIG")
    path = Path(file) if file else Path("hotdesk.toml")
    document: dict[str, Any] = {}
    if path.is_file():
        document = _read_document(path)
    elif file:
        raise ConfigError("config", file, "flag or HOTDESK_CONFIG", "there is no such file")
    values: dict[str, Any] = {}
    plugin_settings = _plugin_sections(document.pop("plugins", {}), path)
    llm = _llm_section(document.pop("llm", {}), environ, path)
    if "plugin_folders" in document:
        document["plugins"] = document.pop("plugin_folders")
    for name, value in document.items():
        values[name] = _convert(name, value, str(path), strict=True)
    for name in ("plugins", "data", "wasm_cache"):
        if values.get(name):
            values[name] = _relative_to(path.parent, values[name])
    for key, raw in environ.items():
        if key.startswith("HOTDESK_") and (name := key[8:].lower()) in SETTINGS:
            values[name] = _convert(name, _split(name, raw), key, strict=False)
    for name, value in flags.items():
        if value is not None:
            values[name] = _convert(name, value, "flag --" + name.replace("_", "-"), strict=False)
    config = Config(**values, plugin_settings=plugin_settings, llm=llm, file=str(path))
    _check_together(config)
    return config


def read_plugin_settings(file: str) -> dict[str, PluginSettings]:
    """Only the `[plugins.*]` of a settings file, for a host that runs. Raises `ConfigError`."""
    path = Path(file)
    return _plugin_sections(_read_document(path).get("plugins", {}), path)


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError("config", str(path), "file", "it is no regular file")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        raise ConfigError("config", str(path), "file", f"it can't be read as TOML: {exc}") from exc


def _plugin_sections(section: Any, path: Path) -> dict[str, PluginSettings]:
    if not isinstance(section, dict):
        raise ConfigError("plugins", section, str(path), "write [plugins.NAME] tables; folders are `plugin_folders`")
    settings = {}
    for name, table in section.items():
        if not isinstance(table, dict):
            raise ConfigError(f"plugins.{name}", table, str(path), f"write it as a table, [plugins.{name}]")
        own = {key: value for key, value in table.items() if key in RESERVED}
        config = {key: value for key, value in table.items() if key not in RESERVED}
        for key, value in own.items():
            try:
                msgspec.convert({key: value}, PluginSettings)
            except msgspec.ValidationError as exc:
                raise ConfigError(f"plugins.{name}.{key}", value, str(path), str(exc)) from exc
        settings[name] = msgspec.convert(own | {"config": config}, PluginSettings)
    return settings


_MODEL_TYPES = {field.name: field.type for field in msgspec.structs.fields(ModelSettings)}
_FROM_ENVIRONMENT = tuple(name for name in LLM_SETTINGS if name not in ("headers", "body"))


def _llm_section(section: Any, environ: Mapping[str, str], path: Path) -> LlmSettings:
    """`[llm]`, its models, and `HOTDESK_LLM_*` over both; the official client's variables where neither has a key."""
    source = str(path)
    if not isinstance(section, dict):
        raise ConfigError("llm", "…", source, "write it as a table, [llm]")
    own = dict(section)
    named = own.pop("models", {})
    fallback = _converted("llm.fallback", own.pop("fallback", []), tuple[str, ...], source)
    grant = _converted("llm.grant", own.pop("grant", LlmSettings().grant), tuple[str, ...], source)
    if not isinstance(named, dict) or not all(isinstance(table, dict) for table in named.values()):
        raise ConfigError("llm.models", "…", source, "write each model as a table, [llm.models.NAME]")
    values = {name: _model_setting(f"llm.{name}", value, source) for name, value in own.items()}
    key_from = "[llm] api_key" if values.get("api_key") else ""
    for variable, raw in environ.items():
        if variable.startswith("HOTDESK_LLM_") and raw:
            name = variable.removeprefix("HOTDESK_LLM_").lower()
            if name not in _FROM_ENVIRONMENT:
                raise ConfigError(variable, "…", "environment", _no_such(name, _FROM_ENVIRONMENT))
            values[name] = _converted(f"llm.{name}", _split_bool(name, raw), _MODEL_TYPES[name], variable, False)
            key_from = variable if name == "api_key" else key_from
    if not values.get("api_key") and not values.get("base_url"):
        for name, variable in (("api_key", "OPENAI_API_KEY"), ("base_url", "OPENAI_BASE_URL")):
            if found := environ.get(variable):
                values[name] = found
                key_from = variable if name == "api_key" else key_from
    models: dict[str, ModelSettings] = {}
    if values.get("api_key") or values.get("base_url"):
        models["default"] = ModelSettings(**values)
    for name, table in named.items():
        if name == "default":
            raise ConfigError("llm.models.default", "…", source, "the model called default is [llm] itself")
        given = {key: _model_setting(f"llm.models.{name}.{key}", value, source) for key, value in table.items()}
        inherited = dict(values)
        if "base_url" in given:  # a key is for one provider, and is not shown to another
            for key in ("api_key", "headers", "api_version", "body"):
                inherited.pop(key, None)
        models[name] = ModelSettings(**(inherited | given))
    for name, model in models.items():
        _check_model(name, model, source)
    for name in fallback:
        if name not in models:
            known = f"there are {', '.join(models)}" if models else f"write [llm.models.{name}]"
            raise ConfigError("llm.fallback", name, source, f"no model is called that; {known}")
    order = [*(["default"] if "default" in models else []), *fallback, *models]
    return LlmSettings(
        models={name: models[name] for name in dict.fromkeys(order)}, fallback=fallback, grant=grant, key_from=key_from,
        environ={name: value for name, value in environ.items() if name.startswith(("HOTDESK_LLM_", "OPENAI_"))},
    )  # fmt: skip


def read_llm_settings(file: str, environ: Mapping[str, str]) -> LlmSettings:
    """Only the `[llm]` of a settings file, for a host that runs. Raises `ConfigError`."""
    path = Path(file)
    return _llm_section(_read_document(path).get("llm", {}), environ, path)


def _no_such(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return "there is no such setting" + (f"; did you mean {near[0]!r}?" if near else "")


def _check_model(name: str, model: ModelSettings, source: str) -> None:
    where = "llm" if name == "default" else f"llm.models.{name}"
    parts = urlsplit(model.base_url)
    if model.base_url and (parts.scheme not in ("http", "https") or not parts.hostname or " " in model.base_url):
        raise ConfigError(f"{where}.base_url", model.base_url, source, "write it as https://HOST/v1")
    if parts.query or parts.fragment:
        raise ConfigError(
            f"{where}.base_url", model.base_url, source, "it ends before the ?; see api_version for Azure"
        )
    if model.api_version and not (model.base_url and model.api_key):
        raise ConfigError(f"{where}.api_version", model.api_version, source, "Azure needs base_url and api_key too")
    if not model.base_url and not model.api_key:
        raise ConfigError(f"{where}.api_key", "", source, "OpenAI needs a key; other servers need base_url")
    headers = [("headers", text) for pair in model.headers.items() for text in pair]
    for key, text in (("api_key", model.api_key), *headers):
        if not text.isprintable() or not text.isascii():
            remedy = "it is one line of ASCII" + ("; is the … of an example still in it?" if "…" in text else "")
            raise ConfigError(f"{where}.{key}", "…", source, remedy)
    if not model.model:
        raise ConfigError(f"{where}.model", "", source, "write the provider's name of a model")
    proxy = urlsplit(model.proxy)
    if model.proxy and (proxy.scheme != "http" or not proxy.hostname):
        raise ConfigError(f"{where}.proxy", "…", source, "write it as http://HOST:PORT")
    for key in ("messages", "stream", "stream_options", "tools"):
        if key in model.body:
            raise ConfigError(f"{where}.body.{key}", "…", source, "that is the host's to say")


def _model_setting(name: str, value: Any, source: str) -> Any:
    short = name.rpartition(".")[2]
    if short not in LLM_SETTINGS:
        known = [*LLM_SETTINGS, "fallback", "grant", "models"] if name.count(".") == 1 else LLM_SETTINGS
        raise ConfigError(name, "…", source, _no_such(short, known))
    return _converted(name, value, _MODEL_TYPES[short], source)


def _converted(name: str, value: Any, to: Any, source: str, strict: bool = True) -> Any:
    try:
        return msgspec.convert(value, to, strict=strict)
    except msgspec.ValidationError as exc:
        shown = "…" if "key" in name or "headers" in name or isinstance(value, dict | list) else value
        raise ConfigError(name, shown, source, str(exc)) from exc


def _split_bool(name: str, raw: str) -> Any:
    if _MODEL_TYPES[name] is bool:
        return {"on": True, "yes": True, "off": False, "no": False}.get(raw.lower(), raw)
    return raw


def _convert(name: str, value: Any, source: str, *, strict: bool) -> Any:
    if name not in SETTINGS:  # whatever it is, its value may be a key
        remedy = f"write it below [llm], as {name}" if name in LLM_SETTINGS else ""
        raise ConfigError(name, "…", source, remedy or _no_such(name, [*SETTINGS, "plugin_folders", "llm", "plugins"]))
    try:
        return msgspec.convert(value, _TYPES[name], strict=strict)
    except msgspec.ValidationError as exc:
        raise ConfigError(name, "…" if "secret" in name or "token" in name else value, source, str(exc)) from exc


def _split(name: str, raw: str) -> Any:
    if _TYPES[name] == tuple[str, ...]:
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    if _TYPES[name] is bool:
        return {"on": True, "yes": True, "off": False, "no": False}.get(raw.lower(), raw)
    return raw


def _relative_to(folder: Path, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(str(folder / part) for part in value)
    return str(folder / value)


def _check_together(config: Config) -> None:
    scheme = config.backend_url.partition(":")[0]
    shared = scheme in REDIS_SCHEMES
    if not shared and (not config.backend_url.startswith("sqlite:///") or len(config.backend_url) <= len("sqlite:///")):
        remedy = "write sqlite:///path (three slashes, four if absolute) or redis://HOST:PORT/0"
        raise ConfigError("backend", "…" if "@" in config.backend else config.backend, "start", remedy)
    if config.workers != 1 and not shared:
        raise ConfigError(
            "workers", config.workers, "start", "the sqlite backend serves from one process; use 1, or a redis backend"
        )
    if config.spool and not shared:
        raise ConfigError("spool", config.spool, "start", "it is for redis; what sqlite takes is on disk anyway")
    for name in ("image_hosts", "http_hosts"):
        for host in getattr(config, name):
            if not host or "/" in host or "*" in host or "@" in host or host != host.strip():
                raise ConfigError(name, host, "start", "write a host, or host:port, without http://")
    if config.visitor_secret and len(config.visitor_secret) < 32:
        raise ConfigError("visitor_secret", "…", "start", "it must have at least 32 characters")
