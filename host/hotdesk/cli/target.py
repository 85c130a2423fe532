"""Which running host a command talks to, as whom, and how it prints the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console

from .admin_client import DEFAULT_URL, AdminClient

__all__ = ["Target", "host_options", "make_console", "print_json"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Target:
    """A host, the admin token for it, and whether scripts read the answer."""

    url: str
    token: str | None
    as_json: bool

    def over(self, url: str | None, token: str | None, as_json: bool) -> Target:
        """The same, but for what was given behind the command."""
        return Target(url or self.url, token or self.token, as_json or self.as_json)

    def ask(self, question: Callable[[AdminClient], Coroutine[Any, Any, T]]) -> T:
        """Have *question* asked of the host, in a loop of its own."""

        async def ask() -> T:
            async with AdminClient(self.url, self.token) as client:
                return await question(client)

        return asyncio.run(ask())


def host_options(command: F) -> F:
    """`--url`, `--token` and `--json`, with their variables."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="The host's answer as JSON."),
        click.option(
            "--token",
            metavar="TOKEN",
            envvar="HOTDESK_ADMIN_TOKEN",
            show_envvar=True,
            help="The admin token that the host's first start showed.",
        ),
        click.option(
            "--url",
            metavar="URL",
            envvar="HOTDESK_URL",
            show_envvar=True,
            default=DEFAULT_URL,
            show_default=True,
            help="The host's address.",
        ),
    ):
        command = option(command)
    return command


def make_console() -> Console:
    """For stdout; wraps nothing when piped, so that one row stays one line."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=not Console().is_terminal)


def print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
