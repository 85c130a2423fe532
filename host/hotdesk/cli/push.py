"""`hotdesk push`: publish plugins for every host that shares a Redis, and tell which of them serve it."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from hotdesk_sdk import HotdeskError, parse_manifest

from ..backend import open_shelf
from ..config import load_config
from ..errors import ConfigError, LoadFailed
from ..logs import configure_logs
from ..runtime.shelf import Record, Shelf, folder_of, pack, publish, push_back, read_records, remove
from ..runtime.sources import Source, find_sources, read_files
from ..runtime.stands import HostStand, read_reports, stands_of
from .check import check_one, plugins_at
from .receipts import one_line, receipt_line

__all__ = ["push"]

LOOK_S = 0.03
"""How often hosts' reports are looked at while they are waited for."""

SILENT_S = 6.0
"""How long a worker that has not said how its plugins stand is waited for: it looks that often whether it did."""


@dataclass(frozen=True, slots=True)
class _Package:
    """A plugin as it is published."""

    name: str
    data: bytes
    files: int
    version: str


@click.command(short_help="Publish a plugin to every host on a Redis.")
@click.argument("plugins", nargs=-1, metavar="[PLUGIN]...")
@click.option("--to", "url", metavar="URL", help="The hosts' Redis.  [default: the backend of the desk in this folder]")
@click.option("--remove", "removes", is_flag=True, help="Unload it everywhere instead.")
@click.option("--back", is_flag=True, help="Push the version before instead.")
@click.option("--force", is_flag=True, help="Push it though nobody has looked whether it loads.")
@click.option("--no-wait", is_flag=True, help="Don't wait for what the hosts say.")
@click.option("--timeout", type=float, default=60.0, show_default=True, metavar="S", help="How long to wait for them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a plugin.")
def push(
    plugins: tuple[str, ...], url: str | None, removes: bool, back: bool, force: bool, no_wait: bool, timeout: float,
    as_json: bool,
) -> None:  # fmt: skip
    """Have every host on a Redis serve these plugins, those too that are away now or come later.

    PLUGIN is a name from the desk's own folders, a plugin's file or folder, or a folder of plugins. Each is loaded and
    probed here first, as by `hotdesk check`. Every host verifies what it got, loads it beside what serves, and swaps;
    where that fails the version before goes on. Without a PLUGIN the command lists what was pushed.

    Exit code 1 when a host refused one, or did not say in time.

    \b
    Examples:
      hotdesk push faq --to redis://10.0.0.5/0     plugins/faq.py, everywhere
      hotdesk push plugins --to redis://10.0.0.5/0 the whole folder
      hotdesk push --back faq --to …               the version before, everywhere
      hotdesk push --remove faq --to …             unload it everywhere
    """
    configure_logs("json", "error")
    if removes and back:
        raise click.UsageError("--remove and --back can't both be")
    if (removes or back) and not plugins:
        raise click.UsageError("which plugin?")
    try:
        to = url or _own_backend()
        if not plugins:
            asyncio.run(_on_shelf(to, lambda shelf: _list(shelf, as_json=as_json)))
            return
        if removes or back:
            names = [Path(given).stem for given in plugins]
            ask = remove if removes else push_back

            async def change(shelf: Shelf) -> list[tuple[Record, bool]]:
                return [(await ask(shelf, name, _me()), True) for name in names]
        else:
            packages = [_prepare(path, force=force) for given in plugins for path in _paths(given)]

            async def change(shelf: Shelf) -> list[tuple[Record, bool]]:
                return [
                    await publish(shelf, one.name, one.data, files=one.files, version=one.version, by=_me())
                    for one in packages
                ]

        wait_s = 0.0 if no_wait else timeout
        good = asyncio.run(_on_shelf(to, lambda shelf: _change(shelf, change, wait_s=wait_s, as_json=as_json)))
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    except HotdeskError as exc:
        raise click.ClickException(str(exc)) from exc
    sys.exit(0 if good else 1)


async def _on_shelf(url: str, work: Callable[[Shelf], Awaitable[Any]]) -> Any:
    shelf = await open_shelf(url)
    try:
        return await work(shelf)
    finally:
        await shelf.aclose()


def _own_backend() -> str:
    backend = load_config({}, os.environ).backend
    if "redis" not in backend.partition(":")[0]:
        raise click.UsageError("say which hosts: --to redis://HOST:PORT/0, the --backend that they run with")
    return backend


def _me() -> str:
    """Who pushes, for those who wonder."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody who has a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


# -- what is pushed ----------------------------------------------------------------------------------------------


def _paths(given: str) -> list[Path]:
    """The plugins that somebody means by *given*."""
    path = Path(given)
    if path.exists():
        return plugins_at(path)
    folders = [Path(folder) for folder in load_config({}, os.environ).plugins]
    for folder in folders:
        if sources := find_sources(folder).get(given):
            return [sources[0].path]
    raise click.UsageError(f"there is no plugin '{given}' in {', '.join(map(str, folders))}, and no such file")


def _prepare(path: Path, *, force: bool) -> _Package:
    """Check a plugin and pack it. Raises `HotdeskError` when no host would serve it."""
    path = path.absolute()
    if path.name in ("__init__.py", "plugin.wasm"):
        path = path.parent
    kind = "folder" if path.is_dir() else path.suffix.removeprefix(".")
    source = Source(path.name if kind == "folder" else path.stem, path, kind)
    name = source.name
    if kind not in ("folder", "py", "wasm"):
        raise LoadFailed(name, "find", "it is no plugin", file=str(path))
    if not force:
        found = asyncio.run(check_one(path))
        if found["error"] is not None:
            raise HotdeskError(f"{found['error']}; nothing was pushed (--force pushes all the same)")
    files = folder_of(source, asyncio.run(read_files(source)))
    manifest = parse_manifest(name, files.get("plugin.toml"), file=str(source.manifest_path))
    if manifest.name != name:
        problem = f"its manifest says name = {manifest.name!r}; a plugin goes by its file's name"
        raise LoadFailed(name, "manifest", problem, file=str(source.manifest_path))
    return _Package(name, pack(name, files), len(files), manifest.version)


# -- what became of it -------------------------------------------------------------------------------------------


async def _change(
    shelf: Shelf, change: Callable[[Shelf], Awaitable[list[tuple[Record, bool]]]], *, wait_s: float, as_json: bool
) -> bool:
    """Publish all, then wait for all; whether nobody refused anything."""
    good = True
    until = time.monotonic() + wait_s
    for record, fresh in await change(shelf):
        say = (lambda line: None) if as_json else click.echo
        say(_headline(record, fresh=fresh))
        stands = await _wait(shelf, record, until, say) if wait_s else []
        bad = [stand for stand in stands if stand.stand in ("refused", "loading", "silent")]
        good = good and not bad
        if as_json:
            told = {
                "plugin": record.name, "hash": record.hash, "version": record.version, "removed": record.removed,
                "published": fresh, "hosts": [stand.public() for stand in stands],
            }  # fmt: skip
            click.echo(msgspec.json.encode(told).decode())
        elif wait_s:
            click.echo(_summary(record, stands))
    return good


async def _wait(shelf: Shelf, record: Record, until: float, say: Callable[[str], None]) -> list[HostStand]:
    """Wait until every host that is alive has said how it stands to *record*, each of which is said as it comes."""
    told: set[str] = set()
    patient = time.monotonic() + SILENT_S
    while True:
        stands = stands_of(read_reports(await shelf.reports()), record.name, record)
        now = time.monotonic()
        open_ends = {"loading", "silent"} if now < patient else {"loading"}
        late = now >= until
        for stand in stands:
            if stand.host not in told and (late or stand.stand not in open_ends):
                told.add(stand.host)
                say(_host_line(record, stand))
        if late or all(stand.host in told for stand in stands):
            return stands
        await asyncio.sleep(LOOK_S)


def _headline(record: Record, *, fresh: bool) -> str:
    name = click.style(record.name, bold=True)
    if record.removed:
        return f"{name} is to be unloaded everywhere"
    size = f"{record.files} {'file' if record.files == 1 else 'files'}, {record.size / 1024:,.1f} KiB"
    return f"{name} {one_line(record.version)}  {record.hash[:12]}  {size}{'' if fresh else '; it was pushed before'}"


def _host_line(record: Record, stand: HostStand) -> str:
    several = f" ({stand.workers} workers)" if stand.workers > 1 else ""
    where = f"  {one_line(stand.host)}{several}  "
    if stand.stand == "serves":
        receipt = stand.receipt
        if receipt is not None and receipt.get("to") == stand.generation:
            return where + receipt_line(receipt)
        return f"{where}serves generation {stand.generation}"
    if stand.stand == "gone":
        return f"{where}does not have it{f': {one_line(stand.why)}' if stand.why else ''}"
    why = one_line(stand.why).removeprefix(f"plugin '{record.name}': ")
    goes_on = f"; generation {stand.generation} goes on serving" if stand.generation is not None else ""
    color = "red" if stand.stand in ("refused", "silent") else "yellow"
    return f"{where}{click.style(str(stand.stand), fg=color)}: {why}{goes_on}"


def _summary(record: Record, stands: Sequence[HostStand]) -> str:
    """`3 hosts serve faq 9f2c1a3b4d5e; 1 refused it: c; 1 lags: b: pending`."""
    if not stands:
        return "no host follows this Redis now; whoever starts on it will"
    refused = [one_line(stand.host) for stand in stands if stand.stand == "refused"]
    lagging = [f"{one_line(stand.host)}: {stand.stand}" for stand in stands if stand.lags and stand.stand != "refused"]
    done = len(stands) - len(refused) - len(lagging)
    verb = ("does without" if done == 1 else "do without") if record.removed else "serves" if done == 1 else "serve"
    parts = [f"{done} {'host' if done == 1 else 'hosts'} {verb} {record.name} {record.hash[:12]}".rstrip()]
    if refused:
        parts.append(f"{len(refused)} refused it: {', '.join(refused)}")
    if lagging:
        parts.append(f"{len(lagging)} {'lags' if len(lagging) == 1 else 'lag'}: {', '.join(lagging)}")
    return "; ".join(parts)


async def _list(shelf: Shelf, *, as_json: bool) -> None:
    """What was pushed, and how many hosts serve it."""
    records, unreadable = read_records((await shelf.read())[0])
    reports = read_reports(await shelf.reports())
    for name, record in sorted(records.items()):
        stands = stands_of(reports, name, record)
        if as_json:
            told = {**msgspec.to_builtins(record), "hosts": [stand.public() for stand in stands]}
            click.echo(msgspec.json.encode(told).decode())
            continue
        at = datetime.fromtimestamp(record.at).isoformat(" ", "minutes")
        what = "removed" if record.removed else f"{one_line(record.version)}  {record.hash[:12]}"
        click.echo(f"{click.style(name, bold=True)}  {what}  {at} by {one_line(record.by)}")
        click.echo(f"  {_summary(record, stands)}")
    for exc in unreadable:
        click.echo(f"{click.style('✗', fg='red')} {one_line(exc)}", err=True)
    if not records and not as_json:
        click.echo("nothing was pushed")
