"""`hotdesk restart`: replace the processes of a running host, one by one, and refuse nobody meanwhile."""

from __future__ import annotations

import asyncio
import time

import click
import msgspec

from .admin_client import AdminClient, ClientFailed, HostAbsent, RollReport
from .receipts import one_line
from .target import Target, host_options, print_json

__all__ = ["restart"]

LOOK_S = 0.2
SILENT_S = 10.0
"""How long the host may be out of reach in the middle of it before this is a failure."""


@click.command(short_help="Replace all workers, one by one; nobody is refused.")
@click.option("--no-wait", is_flag=True, help="Only begin it.")
@host_options
def restart(no_wait: bool, url: str, token: str | None, as_json: bool) -> None:
    """Replace all worker processes of a running host, one by one, with new ones that read the settings file anew.

    A new worker takes over once it serves; the old one finishes what it has. If one does not come to serve, those that
    do go on, and this command says why. It wants a host that runs with `--workers 2` or more.

    \b
    host, port, data, backend and workers stay as they are: they want a stop and a start.
    """
    target = Target(url, token, as_json)
    report = target.ask(_begin if no_wait else _restart)
    if as_json:
        print_json(msgspec.to_builtins(report))
    elif report.state == "running":
        click.echo("the workers are being replaced; `hotdesk workers` tells how far it is")
    elif report.state == "done":
        also = f"; {one_line(report.message)}" if report.message else ""
        click.echo(f"{click.style('✓', fg='green')} {report.replaced} workers replaced{also}")
    if report.state == "failed":
        raise ClientFailed(
            f"the restart failed: {one_line(report.message)}",
            f"{report.replaced} workers were replaced before; all go on serving. The host's log says more.",
        )


async def _begin(client: AdminClient) -> RollReport:
    return RollReport(number=(await client.restart())["restart"], state="running")


async def _restart(client: AdminClient) -> RollReport:
    """Begin it, or join the one under way, and wait for its end."""
    number = (await _begin(client)).number
    heard = time.monotonic()
    while True:
        try:
            report = (await client.workers()).restart
        except HostAbsent:  # the connection was to a worker that has just left
            if time.monotonic() - heard > SILENT_S:
                raise
            report = None
        else:
            heard = time.monotonic()
        if report is not None and (report.number, report.state != "running") >= (number, True):
            return report
        await asyncio.sleep(LOOK_S)
