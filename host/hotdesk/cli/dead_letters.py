"""`hotdesk dead-letters`: messages that ended their worker again and again, listed, shown and requeued."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click
from rich.table import Table

from .admin_client import AdminClient
from .receipts import one_line
from .target import Target, host_options, make_console, print_json

__all__ = ["dead_letters"]


@click.group("dead-letters", invoke_without_command=True, short_help="Messages that were given up.")
@host_options
@click.pass_context
def dead_letters(context: click.Context, url: str, token: str | None, as_json: bool) -> None:
    """Messages whose turn ended its worker again and again (the setting is max_tries), so that they were given up.

    They stay in their conversation, unanswered, until they are requeued.
    """
    context.obj = Target(url, token, as_json)
    if context.invoked_subcommand is None:
        _list(context.obj)


def _own_options(command: Any) -> Any:
    return click.option("--json", "as_json", is_flag=True, help="The host's answer as JSON.")(command)


@dead_letters.command("list")
@_own_options
@click.pass_obj
def list_command(target: Target, as_json: bool) -> None:
    """List them, oldest first."""
    _list(target.over(None, None, as_json))


def _list(target: Target) -> None:
    report = target.ask(AdminClient.dead_letters)
    letters = report["dead_letters"]
    if target.as_json:
        print_json(report)
        return
    console = make_console()
    if not letters:
        console.print("no dead letters")
        return
    heads = ("CONVERSATION", "SEQ", "MESSAGE", "TRIES", "GIVEN UP")
    rows = [
        (
            one_line(letter["conversation"]), str(letter["seq"]), one_line(letter["id"]), str(letter["tries"]),
            datetime.fromtimestamp(letter["at"]).isoformat(" ", "seconds"),
        )
        for letter in letters
    ]  # fmt: skip
    if console.is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in heads:
            table.add_column(head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    for row in (heads, *rows):
        print("\t".join(row))


@dead_letters.command("show")
@click.argument("conversation")
@click.argument("seq", type=int)
@_own_options
@click.pass_obj
def show_command(target: Target, conversation: str, seq: int, as_json: bool) -> None:
    """Show one with its message, as JSON: what the visitor said is in it."""
    print_json(target.over(None, None, as_json).ask(lambda client: client.dead_letter(conversation, seq)))


@dead_letters.command("requeue")
@click.argument("conversation")
@click.argument("seq", type=int)
@_own_options
@click.pass_obj
def requeue_command(target: Target, conversation: str, seq: int, as_json: bool) -> None:
    """Have one answered once more, from its first try."""
    target = target.over(None, None, as_json)
    report = target.ask(lambda client: client.requeue(conversation, seq))
    if target.as_json:
        print_json(report)
    else:
        click.echo(f"{click.style('✓', fg='green')} message {seq} of {one_line(conversation)} is answered once more")
