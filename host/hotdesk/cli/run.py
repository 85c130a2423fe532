"""`hotdesk run`: serve until told to stop, printing each receipt as a line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import click
import msgspec

from hotdesk_sdk import HotdeskError

from ..app import open_host
from ..config import Config, load_config
from ..errors import ConfigError
from ..logs import configure_logs, get_log, logs_are_for_people
from ..runtime.events import Events
from ..workers.loop import leave_the_deaf, loop_factory, raise_file_limit
from ..workers.orders import Greeting
from ..workers.supervisor import open_workers
from .gathered import Gathered
from .receipts import event_line

__all__ = ["run"]


@click.command()
@click.option("--config", "file", metavar="FILE", help="Settings file.  [default: hotdesk.toml if there]")
@click.option("--host", metavar="H", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", metavar="N", help="Port to listen on; 0 picks a free one.  [default: 8080]")
@click.option("--plugins", multiple=True, metavar="DIR", help="Folder of plugins; may be given again.")
@click.option("--data", metavar="DIR", help="Folder for the journal and the keys.  [default: data]")
@click.option("--backend", metavar="URL", help="sqlite:///path or redis://host:port.  [default: in the data folder]")
@click.option("--workers", metavar="N", help="Worker processes on one port; several need Redis.  [default: 1]")
@click.option("--watch", metavar="MODE", help="auto, pending or frozen.  [default: auto]")
@click.option("--log-format", metavar="F", help="auto, console or json.  [default: auto]")
@click.option("--log-level", metavar="L", help="debug, info, warning or error.  [default: info]")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines instead of sentences.")
def run(file: str | None, as_json: bool, plugins: tuple[str, ...], **flags: Any) -> None:
    """Serve conversations, and the plugins in plugins/, until Ctrl-C.

    Every change to a plugin prints its receipt: which generation serves now, and how long it took.
    Every setting has a flag, a HOTDESK_* variable or a line in hotdesk.toml; host/README.md has them all.
    """
    environ = dict(os.environ)

    def read_config() -> Config:
        return load_config({**flags, "plugins": plugins or None}, environ, file=file)

    try:
        config = read_config()
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    configure_logs(config.log_format, config.log_level)
    raise_file_limit()
    several = config.workers > 1
    runner = asyncio.Runner(loop_factory=None if several else loop_factory())
    try:
        with runner:
            if several:
                runner.run(_supervise(config, read_config, as_json=as_json))
            else:
                runner.run(_serve(config, as_json=as_json))
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc
    except HotdeskError as exc:
        raise click.ClickException(str(exc)) from exc


async def _serve(config: Config, *, as_json: bool) -> None:
    """One process."""
    stop = _stop_on_signals()
    say = _say_json if as_json else _say
    async with open_host(config, listen=say, log_events=not logs_are_for_people(config.log_format)) as host:
        if not as_json:
            _greet(Greeting.of(host))
        await stop.wait()
        _leave_on_signals(lambda: None)
        if not as_json:
            click.echo(STOPPING)
    if not as_json:
        _say_stopped(host.turns.live)
    await leave_the_deaf()


async def _supervise(config: Config, read_config: Callable[[], Config], *, as_json: bool) -> None:
    """Several worker processes, each of whose events is printed once."""
    stop = _stop_on_signals()
    log_events = not logs_are_for_people(config.log_format)
    events = Events(get_log() if log_events else None)
    events.listen(_say_json if as_json else _say)
    gathered = Gathered(_echo, config.workers)
    heard = _say_json if as_json else gathered.hear
    try:
        async with open_workers(
            config, read_config=read_config, events=events, heard=heard, log_events=log_events
        ) as supervisor:
            gathered.begin()
            if not as_json:
                _greet(supervisor.greeting)
            had_terminal = _has_terminal()

            def hang_up() -> None:
                if had_terminal and not _has_terminal():
                    stop.set()  # its terminal was closed, and nobody asked for a restart
                else:
                    supervisor.restart()

            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
            await stop.wait()
            _leave_on_signals(supervisor.kill)
            if not as_json:
                click.echo(STOPPING)
            left = await supervisor.stop()
    finally:
        gathered.flush()
    if not as_json:
        _say_stopped(left)


STOPPING = "stopping: finishing what is under way (again to leave at once)"


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _leave_on_signals(first: Callable[[], None]) -> None:
    """Asked twice: leave at once, after *first*."""

    def leave() -> None:
        first()
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, leave)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _say_stopped(left: int) -> None:
    click.echo("stopped" if not left else f"stopped; {left} turns are in the journal and run at the next start")


def _greet(greeting: Greeting) -> None:
    color = click.style
    url = greeting.url
    click.echo(f"{color('hotdesk', bold=True)} serves {', '.join(greeting.serving) or 'no plugins yet'}")
    click.echo(f"  at       {color(url, fg='cyan')}")
    click.echo(f"  plugins  {', '.join(greeting.folders)} ({greeting.watch})")
    click.echo(f"  journal  {greeting.journal}")
    click.echo(f"  model    {greeting.model}")
    if greeting.workers > 1:
        click.echo(f"  workers  {greeting.workers}   (`hotdesk restart` or SIGHUP replaces them one by one)")
    if greeting.resumed:
        click.echo(f"  resumed  {greeting.resumed} turns from before the last stop")
    if greeting.admin_token:
        token = color(greeting.admin_token, fg="yellow")
        click.echo(f"  admin    HOTDESK_ADMIN_TOKEN={token}   (shown this once; kept only as a hash)")
    click.echo(f"  try      hotdesk chat{'' if url.endswith(':8080') else f' --url {url}'}")


def _echo(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        click.echo(line)


def _say(event: Mapping[str, Any]) -> None:
    if event["kind"] == "plugin_receipt" and event["receipt"]["from"] is None:
        return  # how long a new desk waited for its first visitor is nobody's news
    _echo(event_line(event))


def _say_json(event: Mapping[str, Any]) -> None:
    _echo(msgspec.json.encode(event, enc_hook=str).decode())
