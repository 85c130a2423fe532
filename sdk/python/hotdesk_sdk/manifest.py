"""The manifest: `plugin.toml` in a plugin's folder, or `NAME.toml` beside its file."""

from __future__ import annotations

import re
import tomllib
from typing import Any, Literal

import msgspec

from .errors import ApiUnsupported, ManifestInvalid

__all__ = ["API_VERSIONS", "Manifest", "parse_manifest"]

API_VERSIONS = ("1",)
"""The plugin API versions that this SDK describes, oldest first."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}\Z")
_CAPABILITY = re.compile(r"(kv|llm|http:[a-z0-9.-]+(:\d+)?)\Z")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plugin says of itself. Every field has a default, and so has the manifest as a whole."""

    name: str = ""
    version: str = "0.0.0"
    description: str = ""
    api: str = "1"
    order: int = 50
    timeout_ms: int = 5000
    on_failure: Literal["skip", "refuse"] = "skip"
    requires: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    config: dict[str, Any] = {}


def parse_manifest(name: str, source: bytes | None, *, file: str = "plugin.toml") -> Manifest:
    """Read the manifest of the plugin called *name*; None stands for "there is no manifest".

    Raises `ManifestInvalid` with the file, the field and the remedy, or `ApiUnsupported`.
    """
    try:
        data = tomllib.loads(source.decode()) if source is not None else {}
        manifest = msgspec.convert(data, Manifest)
    except UnicodeDecodeError as exc:
        raise ManifestInvalid(name, f"{file} is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ManifestInvalid(name, f"{file} is not TOML: {exc}") from exc
    except msgspec.ValidationError as exc:
        known = ", ".join(Manifest.__struct_fields__)
        raise ManifestInvalid(name, f"{file}: {exc}; a manifest has {known}") from exc
    chosen = manifest.name or name
    if not _NAME.match(chosen):
        raise ManifestInvalid(
            name,
            f"{file or 'the file name'}: a plugin name is a letter, then letters, digits, - or _",
        )
    if manifest.api not in API_VERSIONS:
        raise ApiUnsupported(chosen, manifest.api, API_VERSIONS)
    if manifest.timeout_ms <= 0:
        raise ManifestInvalid(chosen, f"{file}: timeout_ms is {manifest.timeout_ms}; it must be above 0")
    for capability in manifest.capabilities:
        if not _CAPABILITY.match(capability):
            raise ManifestInvalid(
                chosen, f"{file}: capability {capability!r} is not known; there are kv, llm and http:HOST"
            )
    return msgspec.structs.replace(manifest, name=chosen)
