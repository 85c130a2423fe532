"""`hotdesk workers`: the processes that serve a running host."""

from __future__ import annotations

import time
from datetime import datetime

import click
from rich.table import Table
from rich.text import Text

from .admin_client import AdminClient, Worker, WorkersReport
from .receipts import one_line
from .target import Target, host_options, make_console, print_json

__all__ = ["workers"]

_STATE_STYLE = {"ready": "green", "starting": "cyan", "leaving": "yellow", "down": "bold red"}

HEADS = ("WORKER", "PID", "STATE", "SINCE", "CONNECTIONS", "TURNS", "RESTARTS")


@click.command(short_help="The processes that serve, and how they are.")
@host_options
def workers(url: str, token: str | None, as_json: bool) -> None:
    """The worker processes of a running host: since when each serves, how many connections and turns it has now.

    A worker that was replaced is `leaving` until it has finished what it has. One that died is started again at once;
    RESTARTS counts that.
    """
    report = Target(url, token, as_json).ask(AdminClient.workers)
    if as_json:
        print_json(report.raw)
        return
    console = make_console()
    rows = [_row(worker) for worker in report.workers]
    if console.is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in HEADS:
            table.add_column(head, justify="left" if head in ("STATE", "SINCE") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        plain = [HEADS, *(tuple(cell.plain for cell in row) for row in rows)]
        widths = [max(len(row[i]) for row in plain) for i in range(len(HEADS))]
        for line in plain:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for note in _notes(report):
        console.print(note)


def _row(worker: Worker) -> tuple[Text, ...]:
    return (
        Text(str(worker.worker), style="bold"),
        Text(str(worker.pid) if worker.pid else "-"),
        Text(one_line(worker.state), style=_STATE_STYLE.get(worker.state, "dim")),
        Text(_since(worker.since)),
        Text(_count(worker.connections)),
        Text(_count(worker.turns)),
        Text(str(worker.restarts), style="yellow" if worker.restarts else "dim"),
    )


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _since(at: float | None) -> str:
    if at is None:
        return "-"
    today = time.time() - at < 86400
    return datetime.fromtimestamp(at).strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")


def _notes(report: WorkersReport) -> list[Text]:
    notes = [
        Text(f"worker {worker.worker} does not answer", style="red")
        for worker in report.workers
        if worker.state == "ready" and worker.connections is None
    ]
    roll = report.restart
    if roll is not None and roll.state == "running":
        notes.append(Text(f"a restart is under way; {roll.replaced} replaced so far", style="cyan"))
    if roll is not None and roll.state == "failed":
        notes.append(Text(f"the last restart failed: {one_line(roll.message)}", style="red"))
    return notes
