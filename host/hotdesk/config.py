"""Settings: flags over `HOTDESK_*` environment over `hotdesk.toml` over defaults.

Owns every read of the environment and of the settings file. A wrong setting is a `ConfigError` with the
setting's name, the value, where it came from and what would be right.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .errors import ConfigError

__all__ = ["RESERVED", "Config", "PluginSettings", "load_config", "read_plugin_settings"]

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]


class PluginSettings(msgspec.Struct, frozen=True):
    """What the operator says of one plugin in `[plugins.NAME]`; all other keys there are the plugin's own config."""

    enabled: bool = True
    order: int | None = None
    timeout_ms: Positive | None = None
    on_failure: Literal["skip", "refuse"] | None = None
    grant: tuple[str, ...] = ()
    config: dict[str, Any] = {}


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
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_text: bool = False
    admin_token: str = ""
    allowed_origins: tuple[str, ...] = ()
    visitor_tokens: bool = False
    visitor_secret: str = ""
    visitor_token_s: Positive = 3600
    max_turns: Positive = 2048
    max_body_bytes: Positive = 8 * 1024 * 1024
    max_text_bytes: Positive = 128 * 1024
    max_reply_chars: Positive = 1024 * 1024
    max_buffer_bytes: Positive = 512 * 1024
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
    retention_days: NotNegative = 0
    plugin_settings: dict[str, PluginSettings] = {}
    file: str | None = None

    @property
    def backend_url(self) -> str:
        return self.backend or f"sqlite:///{Path(self.data) / 'hotdesk.db'}"


SETTINGS: tuple[str, ...] = tuple(name for name in Config.__struct_fields__ if name not in ("plugin_settings", "file"))
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
    if "plugin_folders" in document:
        document["plugins"] = document.pop("plugin_folders")
    for name, value in document.items():
        values[name] = _convert(name, value, str(path), strict=True)
    for name in ("plugins", "data"):
        if name in values:
            values[name] = _relative_to(path.parent, values[name])
    for key, raw in environ.items():
        if key.startswith("HOTDESK_") and (name := key[8:].lower()) in SETTINGS:
            values[name] = _convert(name, _split(name, raw), key, strict=False)
    for name, value in flags.items():
        if value is not None:
            values[name] = _convert(name, value, "flag --" + name.replace("_", "-"), strict=False)
    config = Config(**values, plugin_settings=plugin_settings, file=str(path) if path.is_file() else None)
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


def _convert(name: str, value: Any, source: str, *, strict: bool) -> Any:
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, 1)
        raise ConfigError(
            name, value, source, f"there is no such setting{f'; did you mean {near[0]!r}?' if near else ''}"
        )
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
    if scheme in ("redis", "rediss", "redis+cluster", "redis+sentinel"):
        raise ConfigError("backend", config.backend, "start", "this version has sqlite:///path only")
    if not config.backend_url.startswith("sqlite:///") or len(config.backend_url) <= len("sqlite:///"):
        raise ConfigError("backend", config.backend, "start", "write sqlite:///path (three slashes, four if absolute)")
    if config.workers != 1:
        raise ConfigError("workers", config.workers, "start", "the sqlite backend serves from one process; use 1")
    if config.visitor_secret and len(config.visitor_secret) < 32:
        raise ConfigError("visitor_secret", "…", "start", "it must have at least 32 characters")
