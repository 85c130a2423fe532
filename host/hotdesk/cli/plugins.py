"""`hotdesk plugins`: what serves on a running host, and the commands that change it.

Tables and colour for people, aligned plain text when piped, the host's own JSON with `--json`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import click
import msgspec
from rich.table import Table
from rich.text import Text

from .admin_client import Action, AdminClient, Elsewhere, OnHost, Plugin, PluginFailure
from .receipts import one_line, receipt_line
from .target import Target, host_options, make_console, print_json

__all__ = ["plugins"]

F = TypeVar("F", bound=Callable[..., Any])

_STATE_STYLE = {"ACTIVE": "green", "LOADING": "cyan", "PENDING": "cyan", "DRAINING": "yellow", "FAILED": "bold red"}


class _PluginsGroup(click.Group):
    """Says what was probably meant when a plugin's name stands where a command should."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            raise click.UsageError(
                f"no such command '{args[0]}'; there are {', '.join(self.list_commands(ctx))} "
                f"(about one plugin: `hotdesk plugins show {args[0]}`)",
                ctx=ctx,
            ) from exc

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _target_options(command: F) -> F:
    """The options of the group again, so that they may stand behind the command too."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="The host's answer as JSON."),
        click.option("--token", metavar="TOKEN", help="The admin token."),
        click.option("--url", metavar="URL", help="The host's address."),
    ):
        command = option(command)
    return command


@click.group(cls=_PluginsGroup, invoke_without_command=True)
@host_options
@click.pass_context
def plugins(ctx: click.Context, url: str, token: str | None, as_json: bool) -> None:
    """See and change the plugins of a running host.

    Without a command it lists them. What a command changes is changed for good: a disabled plugin stays
    disabled over restarts, and a rollback holds until the file changes again.

    \b
    Examples:
      hotdesk plugins                        all of them
      hotdesk plugins show faq               one, with its config and kept generations
      hotdesk plugins rollback faq           back to the version before
      hotdesk plugins disable faq            out of the way; its file is left alone
      hotdesk plugins list --json | jq -r '.plugins[] | select(.error) | .name'
    """
    ctx.obj = Target(url, token, as_json)
    if ctx.invoked_subcommand is None:
        _list(ctx.obj)


@plugins.command("list", short_help="All plugins: state, generation, order, hooks, trouble.")
@_target_options
@click.pass_obj
def list_command(target: Target, url: str | None, token: str | None, as_json: bool) -> None:
    """All plugins, from the outermost in: state, generation, order, hooks and what is wrong."""
    _list(target.over(url, token, as_json))


@plugins.command(short_help="One plugin with everything about it.")
@click.argument("name")
@_target_options
@click.pass_obj
def show(target: Target, name: str, url: str | None, token: str | None, as_json: bool) -> None:
    """One plugin: what it hooks, asks for and was granted, its config, its last swap and what can be rolled back to."""
    target = target.over(url, token, as_json)
    plugin = target.ask(lambda client: client.plugin(name))
    if target.as_json:
        print_json(plugin.raw)
    else:
        _print_one(plugin)


def _action(action: Action, help: str, short_help: str) -> None:
    @plugins.command(action, help=help, short_help=short_help)
    @click.argument("name")
    @_target_options
    @click.pass_obj
    def command(target: Target, name: str, url: str | None, token: str | None, as_json: bool) -> None:
        target = target.over(url, token, as_json)
        plugin = target.ask(lambda client: client.act(name, action))
        if target.as_json:
            print_json(plugin.raw)
        else:
            make_console().print(_outcome(action, plugin))


_action(
    "reload",
    "Load a plugin's source anew, even if its bytes are the same. If that fails, what serves goes on serving.",
    "Load it anew, beside the old one, and swap.",
)
_action("enable", "Load a disabled plugin. It stays enabled over restarts.", "Let a disabled one serve again.")
_action(
    "disable",
    "Drain and unload a plugin. Its file is left alone, and it stays disabled over restarts.",
    "Drain and unload it; its file stays.",
)
_action(
    "rollback",
    "Serve the version before this one, as a new generation. It holds until the plugin's file changes again.",
    "Serve the version before this one.",
)


def _list(target: Target) -> None:
    listing = target.ask(AdminClient.list_plugins)
    if target.as_json:
        answer = {"plugins": [plugin.raw for plugin in listing.plugins]}
        if listing.elsewhere:
            answer["elsewhere"] = [plugin.raw for plugin in listing.elsewhere]
        print_json(answer)
        return
    if listing.plugins:
        _print_table(listing.plugins)
    elif not listing.elsewhere:
        make_console().print("No plugins. `hotdesk new NAME` writes one; saved is live.")
    for plugin in listing.elsewhere:
        make_console().print(_elsewhere(plugin))


# -- how it looks ------------------------------------------------------------------------------------------


def _print_table(found: list[Plugin]) -> None:
    console = make_console()
    heads: tuple[str, ...] = ("PLUGIN", "STATE", "GEN", "ORDER", "CALLS", "FAILED", "HOOKS")
    rows = [_row(plugin) for plugin in found]
    if any(len(plugin.hosts) > 1 for plugin in found):
        heads = (*heads[:3], "HOSTS", *heads[3:])
        rows = [(*row[:3], _hosts(plugin), *row[3:]) for row, plugin in zip(rows, found, strict=True)]
    if console.is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in heads:
            numeric = head in ("GEN", "HOSTS", "ORDER", "CALLS", "FAILED")
            table.add_column(head, justify="right" if numeric else "left", no_wrap=head != "HOOKS")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        plain = [heads, *(tuple(cell.plain for cell in row) for row in rows)]
        widths = [max(len(row[i]) for row in plain) for i in range(len(heads))]
        for line in plain:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for plugin in found:
        for note in _notes(plugin):
            console.print(note)


def _row(plugin: Plugin) -> tuple[Text, ...]:
    failures = Text(str(plugin.failures), style="yellow" if plugin.failures else "dim")
    return (
        Text(one_line(plugin.name), style="bold"),
        _state(plugin),
        Text("-" if plugin.generation is None else str(plugin.generation)),
        Text("-" if plugin.order is None else str(plugin.order)),
        Text(str(plugin.calls)),
        failures,
        Text(" ".join(plugin.hooks) or "-", style="dim"),
    )


def _state(plugin: Plugin) -> Text:
    if not plugin.enabled:
        return Text("disabled", style="dim")
    if plugin.breaker != "closed":
        return Text(plugin.state, style="bold red")
    style = "yellow" if plugin.error and plugin.state == "ACTIVE" else _STATE_STYLE.get(plugin.state, "dim")
    return Text(plugin.state, style=style)


def _notes(plugin: Plugin) -> list[Text]:
    """What an operator should know of a plugin without asking: why it does not serve as saved, and what it lacks."""
    notes = []
    if plugin.error and not _lags(plugin):
        serving = "" if plugin.generation is None else f"; generation {plugin.generation} goes on serving"
        notes.append(_note(plugin, "red", f"{_failure(plugin.name, plugin.error)}{serving}"))
    for worker, how in _lags(plugin).items():
        notes.append(_note(plugin, "red", f"worker {worker} {how}"))
    notes += [_note(plugin, "yellow", f"{host.host} lags: {_stand(host)}") for host in plugin.hosts if host.lags]
    if plugin.pending:
        notes.append(_note(plugin, "cyan", f"has changed; it waits for `hotdesk plugins reload {plugin.name}`"))
    if plugin.waiting_for:
        notes.append(_note(plugin, "cyan", f"waits for {plugin.waiting_for}, which it requires"))
    lacking = [one for one in plugin.capabilities.asked if one not in plugin.capabilities.granted]
    if lacking and plugin.enabled:
        granted = ", ".join(f'"{one}"' for one in plugin.capabilities.asked)
        where = f"in hotdesk.toml: [plugins.{plugin.name}] grant = [{granted}]"
        notes.append(_note(plugin, "yellow", f"asks for {', '.join(lacking)}, not granted; {where}"))
    if plugin.last_failure:
        at = datetime.fromtimestamp(plugin.last_failure.get("at", 0)).strftime("%H:%M:%S")
        problem = one_line(plugin.last_failure.get("problem", "?"))
        notes.append(_note(plugin, "yellow", f"a call failed at {at}: {problem}"))
    if plugin.breaker != "closed":
        state = plugin.breaker.replace("_", "-")
        notes.append(_note(plugin, "red", f"breaker {state}: left out of turns until a trial call succeeds"))
    notes += [_note(plugin, "yellow", f"left behind: {one}") for one in plugin.leftovers]
    return notes


def _lags(plugin: Plugin) -> dict[int, str]:
    """The workers that do not stand where most do, and how each stands; empty where all agree."""
    rows = {row["worker"]: (row.get("generation"), row.get("state")) for row in plugin.workers}
    stands = list(rows.values())
    if len(set(stands)) < 2 and len({bool(row.get("error")) for row in plugin.workers}) < 2:
        return {}
    usual = max(stands, key=lambda one: (stands.count(one), one[0] or 0))
    lags = {}
    for row in plugin.workers:
        failure = _failure(plugin.name, msgspec.convert(row["error"], PluginFailure)) if row.get("error") else ""
        if rows[row["worker"]] != usual or failure:
            generation = row.get("generation")
            serves = "serves none" if generation is None else f"serves generation {generation}"
            rest = "" if usual[0] is None or usual[0] == generation else f", the others {usual[0]}"
            lags[row["worker"]] = serves + rest + (f": {failure}" if failure else "")
    return lags


def _hosts(plugin: Plugin) -> Text:
    """How many hosts have it, and how many of them stand as they should."""
    there = [host for host in plugin.hosts if host.lags or host.generation is not None or host.stand != "gone"]
    lagging = sum(host.lags for host in there)
    if lagging:
        return Text(f"{len(there) - lagging} of {len(there)}", style="yellow")
    return Text(str(len(there)) if there else "-")


def _stand(host: OnHost) -> str:
    """How a host stands, in words."""
    serves = "serves none" if host.generation is None else f"serves generation {host.generation} {host.hash[:12]}"
    several = f" in {host.workers} workers" if host.workers > 1 else ""
    if not host.lags:
        return f"{serves}{several}{f'; {host.why}' if host.why else ''}"
    return f"{serves}{several}; {host.stand}: {host.why}"


def _elsewhere(plugin: Elsewhere) -> Text:
    """A plugin that other hosts have, and this one does not."""
    hosts = "; ".join(f"{host.host} {_stand(host)}" for host in plugin.hosts)
    text = f"is not here; {hosts}" if hosts else "is not here, and no host says that it has it"
    return Text.assemble((f"{one_line(plugin.name)}: ", "bold yellow"), (one_line(text), "yellow"))


def _note(plugin: Plugin, style: str, text: str) -> Text:
    return Text.assemble((f"{one_line(plugin.name)}: ", f"bold {style}"), (one_line(text), style))


def _failure(name: str, error: PluginFailure) -> str:
    message = one_line(error.message).removeprefix(f"plugin '{name}': ")
    place = ""
    if error.file and error.file not in message:
        place = f" ({error.file}:{error.line})" if error.line else f" ({error.file})"
    # What was rolled back did load; the message says all of it.
    failed = f"failed at {error.step}: " if error.step and error.step != "probation" else ""
    return f"{failed}{message}{place}"


def _outcome(action: Action, plugin: Plugin) -> Text:
    """One line on what a command did."""
    name = one_line(plugin.name)
    if action == "disable":
        return Text(f"{name} is disabled; `hotdesk plugins enable {name}` lets it serve again")
    if plugin.receipt and plugin.generation is not None:
        return Text.assemble(("✓ ", "green"), receipt_line(plugin.receipt))
    serves = "is enabled but does not serve" if plugin.generation is None else f"serves, generation {plugin.generation}"
    why = f": {_failure(plugin.name, plugin.error)}" if plugin.error else f" ({plugin.state})"
    return Text(f"{name} {serves}{why}")


def _print_one(plugin: Plugin) -> None:
    console = make_console()
    generation = "" if plugin.generation is None else f"  generation {plugin.generation}"
    console.print(
        Text.assemble((one_line(plugin.name), "bold"), f" {plugin.version or ''}  ", _state(plugin), generation)
    )
    for note in _notes(plugin):
        console.print(note)
    facts = [
        ("source", plugin.source or "-"),
        ("order", "-" if plugin.order is None else f"{plugin.order} ({plugin.order_from})"),
        ("hooks", " ".join(plugin.hooks) or "-"),
        ("requires", " ".join(plugin.requires) or "-"),
        ("asks for", " ".join(plugin.capabilities.asked) or "-"),
        ("granted", " ".join(plugin.capabilities.granted) or "-"),
        ("calls", f"{plugin.calls}, {plugin.failures} failed; breaker {plugin.breaker.replace('_', '-')}"),
    ]
    if plugin.component:
        about = plugin.component
        text = f"hotdesk:plugin@{about.get('contract')}, instances {about.get('instances')}"
        facts.insert(3, ("component", text))
    if plugin.receipt:
        facts.append(("last swap", receipt_line(plugin.receipt)))
    if plugin.pushed:
        pushed = plugin.pushed
        what = "removed" if pushed.removed else f"{pushed.hash[:12]}  {pushed.version}"
        facts.append(("pushed", f"{what}  {_when(pushed.at)} by {pushed.by}"))
    facts += [("hosts" if i == 0 else "", f"{host.host}  {_stand(host)}") for i, host in enumerate(plugin.hosts)]
    facts += [("kept" if i == 0 else "", line) for i, line in enumerate(_kept(plugin))]
    facts += [
        ("config" if i == 0 else "", f"{one_line(key)} = {one_line(msgspec.json.encode(value).decode())}")
        for i, (key, value) in enumerate(plugin.config.items())
    ]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for fact, value in facts:
        if console.is_terminal:
            table.add_row(fact, Text(one_line(value)))
        else:
            print(f"{fact:<10}{one_line(value)}")
    if console.is_terminal:
        console.print(table)


def _kept(plugin: Plugin) -> list[str]:
    lines = []
    for kept in reversed(plugin.kept):
        serving = "  serving" if kept.generation == plugin.generation else ""
        lines.append(f"generation {kept.generation}  {kept.version}  {kept.hash[:12]}  {_when(kept.at)}{serving}")
    return lines


def _when(at: float | str | None) -> str:
    if isinstance(at, int | float):
        return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
    return at or "-"
