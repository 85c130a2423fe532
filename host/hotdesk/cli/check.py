"""`hotdesk check`: load and probe a plugin beside nothing, and say what it hooks and asks for."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec

from hotdesk_sdk import HotdeskError, parse_manifest

from ..app import open_host
from ..config import Config, PluginSettings, load_config
from ..errors import ConfigError
from ..logs import configure_logs
from ..runtime.sources import find_sources

__all__ = ["check", "check_one", "plugins_at"]


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a plugin.")
def check(paths: tuple[Path, ...], as_json: bool) -> None:
    """Load and probe each plugin beside nothing; exit 1 with the reason when one would not serve.

    PATH is a plugin's file or folder. In a desk's folder, what is compiled of a component is kept for the desk's host.
    What it requires is taken from beside it. Its setup() and probe() run
    for real, with everything granted that it asks for and a journal of its own that is thrown away.
    """
    configure_logs("json", "error")
    failed = False
    for path in dict.fromkeys(found for given in paths for found in plugins_at(given)):
        found = asyncio.run(check_one(path.absolute()))
        failed = failed or found["error"] is not None
        if as_json:
            click.echo(msgspec.json.encode(found).decode())
        else:
            _show(found)
    sys.exit(1 if failed else 0)


def plugins_at(path: Path) -> list[Path]:
    """The plugins that a path names: itself; a manifest's plugin; or all in a folder of plugins."""
    if path.suffix == ".toml":
        if path.name == "plugin.toml":
            return [path.parent]
        return [beside for kind in (".py", ".wasm") if (beside := path.with_suffix(kind)).exists()] or [path]
    parts = ("__init__.py", "plugin.wasm", "plugin.toml")
    if path.is_dir() and not any((path / part).exists() for part in parts):
        return [source.path for found in find_sources(path).values() for source in found] or [path]
    return [path]


async def check_one(path: Path) -> dict[str, Any]:
    """What one plugin hooks and asks for; `error` is None, or why it would not serve."""
    if path.name in ("__init__.py", "plugin.wasm"):
        path = path.parent
    name = path.name if path.is_dir() else path.stem
    found: dict[str, Any] = {"plugin": name, "path": str(path), "error": None}
    with tempfile.TemporaryDirectory(prefix="hotdesk-check-") as folder:
        desk = Path(folder, "plugins")
        desk.mkdir()
        built = any((path / part).exists() for part in ("__init__.py", "plugin.wasm"))
        if path.is_dir() and not built and (path / "Makefile").exists():
            return found | {"error": f"there is no plugin.wasm yet: make -C {path}"}
        try:
            settings = _place(path, desk, {})
            config = Config(
                plugins=(str(desk),),
                data=str(Path(folder, "data")),
                wasm_cache=_code_cache(),
                wasm_baseline=False,
                watch="frozen",
                plugin_settings=settings,
            )
            async with open_host(config, serve=False, log_events=False) as host:
                entry = host.plugins.entry(name)
                current = entry.current
                if entry.problem is not None or current is None:
                    waiting = f"it requires '{entry.waiting_for}', which is not beside it"
                    found["error"] = entry.problem.message if entry.problem else waiting
                    found["file"] = entry.problem.file if entry.problem else None
                    found["line"] = entry.problem.line if entry.problem else None
                else:
                    manifest = current.manifest
                    component = current.bundle.component
                    if component is not None:
                        found["component"] = {
                            "contract": component.version,
                            "exports": list(component.exports),
                            "imports": list(component.imports),
                            "bytes": sum(len(data) for name, data in current.bundle.files.items() if ".wasm" in name),
                        }
                    found |= {
                        "version": manifest.version,
                        "hooks": list(current.hooks),
                        "tools": [tool.name for tool in current.tools],
                        "capabilities": list(manifest.capabilities),
                        "requires": list(manifest.requires),
                        "order": manifest.order,
                        "timeout_ms": manifest.timeout_ms,
                        "on_failure": manifest.on_failure,
                        "steps": entry.receipt.public()["steps"] if entry.receipt else {},
                    }
        except (HotdeskError, OSError) as exc:
            found["error"] = str(exc)
        for key in ("error", "file"):
            if isinstance(found.get(key), str):
                found[key] = found[key].replace(str(desk), str(path.parent))
    return found


def _code_cache() -> str:
    """Where the desk in this folder keeps compiled components, so that what is checked here serves at once there;
    empty where there is no desk."""
    try:
        config = load_config({}, os.environ)
    except ConfigError:
        return ""
    folder = config.wasm_cache or str(Path(config.data, "wasm"))
    return str(Path(folder).absolute()) if config.wasm_cache or Path(config.data).is_dir() else ""


def _place(path: Path, desk: Path, settings: dict[str, PluginSettings]) -> dict[str, PluginSettings]:
    """Link the plugin, and what it requires, into the folder that is checked."""
    name = path.name if path.is_dir() else path.stem
    if name in settings:
        return settings
    manifest = path / "plugin.toml" if path.is_dir() else path.with_suffix(".toml")
    raw = manifest.read_bytes() if manifest.exists() else None
    asked = parse_manifest(name, raw, file=str(manifest))
    settings[name] = PluginSettings(grant=asked.capabilities)
    (desk / path.name).symlink_to(path)
    if manifest.exists() and not path.is_dir():
        (desk / manifest.name).symlink_to(manifest)
    for other in asked.requires:
        for candidate in (path.parent / f"{other}.py", path.parent / f"{other}.wasm", path.parent / other):
            if candidate.exists():
                _place(candidate, desk, settings)
                break
    return settings


def _show(found: dict[str, Any]) -> None:
    if found["error"] is not None:
        click.echo(f"{click.style('✗', fg='red')} {found['plugin']}  {found['path']}")
        click.echo(f"  {found['error']}")
        return
    click.echo(f"{click.style('✓', fg='green')} {found['plugin']} {found['version']}  {found['path']}")
    if component := found.get("component"):
        imports = ", ".join(component["imports"]) or "nothing"
        size = f"{component['bytes'] / 1024:,.0f} KiB"
        click.echo(f"  {'component':13}hotdesk:plugin@{component['contract']}, {size}, imports {imports}")
    for label in ("hooks", "tools", "capabilities", "requires"):
        if found[label]:
            click.echo(f"  {label:13}{', '.join(found[label])}")
    click.echo(f"  {'order':13}{found['order']}, timeout {found['timeout_ms']} ms, on failure {found['on_failure']}")
    steps = ", ".join(f"{name.removesuffix('_ms')} {value:.1f} ms" for name, value in found["steps"].items())
    click.echo(f"  {'steps':13}{steps}")
