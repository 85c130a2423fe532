"""`hotdesk run`: serve until told to stop, printing each receipt as a line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import click
import msgspec

from hotdesk_sdk import HotdeskError

from ..app import Host, open_host
from ..config import Config, load_config
from ..errors import ConfigError
from ..logs import configure_logs, logs_are_for_people
from .receipts import event_line

__all__ = ["run"]

DEAF_S = 1.0
"""How long a task may take to hear that the host has stopped."""


@click.command()
@click.option("--config", "file", metavar="FILE", help="Settings file.  [default: hotdesk.toml if there]")
@click.option("--host", metavar="H", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", metavar="N", help="Port to listen on; 0 picks a free one.  [default: 8080]")
@click.option("--plugins", multiple=True, metavar="DIR", help="Folder of plugins; may be given again.")
@click.option("--data", metavar="DIR", help="Folder for the journal and the keys.  [default: data]")
@click.option("--backend", metavar="URL", help="sqlite:///path.  [default: in the data folder]")
@click.option("--workers", metavar="N", help="Worker processes.  [default: 1]")
@click.option("--watch", metavar="MODE", help="auto, pending or frozen.  [default: auto]")
@click.option("--log-format", metavar="F", help="auto, console or json.  [default: auto]")
@click.option("--log-level", metavar="L", help="debug, info, warning or error.  [default: info]")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines instead of sentences.")
def run(file: str | None, as_json: bool, plugins: tuple[str, ...], **flags: Any) -> None:
    """Serve conversations, and the plugins in plugins/, until Ctrl-C.

    Every change to a plugin prints its receipt: which generation serves now, and how long it took.
    Every setting has a flag, a HOTDESK_* variable or a line in hotdesk.toml; host/README.md has them all.
    """
    try:
        config = load_config({**flags, "plugins": plugins or None}, os.environ, file=file)
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    configure_logs(config.log_format, config.log_level)
    runner = asyncio.Runner(loop_factory=_loop_factory())
    try:
        with runner:
            runner.run(_serve(config, as_json=as_json))
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    except HotdeskError as exc:
        raise click.ClickException(str(exc)) from exc


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(config: Config, *, as_json: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    say = _say_json if as_json else _say
    async with open_host(config, listen=say, log_events=not logs_are_for_people(config.log_format)) as host:
        if not as_json:
            _greet(host)
        await stop.wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: os._exit(130))  # asked twice: leave at once
        if not as_json:
            click.echo("stopping: finishing what is under way (again to leave at once)")
    if not as_json:
        left = host.turns.live
        click.echo("stopped" if not left else f"stopped; {left} turns are in the journal and run at the next start")
    await _leave_the_deaf()


async def _leave_the_deaf() -> None:
    """End the process if a plugin's task ignores its cancellation: the loop would wait for it for ever.

    Everything is closed and on disk by now.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others and (await asyncio.wait(others, timeout=DEAF_S))[1]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _greet(host: Host) -> None:
    color = click.style
    slots = sorted((e.slot.order, e.name) for e in host.plugins.entries if e.slot is not None)
    serving = [name for _, name in slots]
    click.echo(f"{color('hotdesk', bold=True)} serves {', '.join(serving) or 'no plugins yet'}")
    click.echo(f"  at       {color(host.url, fg='cyan')}")
    click.echo(f"  plugins  {', '.join(host.config.plugins)} ({host.plugins.watch_mode})")
    click.echo(f"  journal  {host.backend.url}")
    click.echo(f"  model    {host.llm.describe()}")
    if host.resumed:
        click.echo(f"  resumed  {host.resumed} turns from before the last stop")
    if host.new_admin_token:
        token = color(host.new_admin_token, fg="yellow")
        click.echo(f"  admin    HOTDESK_ADMIN_TOKEN={token}   (shown this once; kept only as a hash)")
    click.echo(f"  try      hotdesk chat{'' if host.url.endswith(':8080') else f' --url {host.url}'}")


def _say(event: Mapping[str, Any]) -> None:
    if event["kind"] == "plugin_receipt" and event["receipt"]["from"] is None:
        return  # how long a new desk waited for its first visitor is nobody's news
    with contextlib.suppress(BrokenPipeError):
        click.echo(event_line(event))


def _say_json(event: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        click.echo(msgspec.json.encode(event, enc_hook=str).decode())
