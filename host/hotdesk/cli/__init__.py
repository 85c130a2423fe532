"""The command line: `hotdesk` and its commands.

This room owns what people type and what they read back. `run` and `check` build a desk in this process, `push` speaks
to its Redis; every other command is a client, or writes files, and needs nothing of the host's insides.
"""

from __future__ import annotations

import click

from .chat import chat
from .check import check
from .dead_letters import dead_letters
from .plugins import plugins
from .push import push
from .restart import restart
from .run import run
from .scaffold import init, new
from .workers import workers

__all__ = ["main"]

_CHAPTERS = {
    "Serve": ("run", "init"),
    "Write plugins": ("new", "check"),
    "Work with a running host": ("plugins", "chat", "workers", "restart", "dead-letters"),
    "Work with many hosts": ("push",),
}

_EPILOG = """\b
Examples:
  hotdesk init desk && cd desk && hotdesk run    a desk of your own, serving
  hotdesk chat                                   talk to it
  hotdesk new hours --kind bot                   plugins/hours/: saved is live
  hotdesk check plugins/hours                    what does it hook and ask for?
  hotdesk plugins                                what serves, in which generation
  hotdesk plugins rollback faq                   back to the version before
  hotdesk push plugins/faq.py --to redis://…     the same on every host
  hotdesk restart                                all workers anew, one by one
  hotdesk plugins --json | jq '.plugins[].name'  for scripts

\b
Settings:
  A flag wins over its HOTDESK_* variable, that over hotdesk.toml, that over the
  default. The clients (plugins, chat, …) read HOTDESK_URL, HOTDESK_ADMIN_TOKEN and
  HOTDESK_VISITOR_TOKEN.

\b
Exit codes:
  0    done
  1    it was tried and failed, or was refused; the reason is on stderr
  2    the command line or a setting is wrong
  3    no hotdesk host answers at the URL
  130  interrupted with Ctrl-C
"""


class _Chaptered(click.Group):
    """A group whose help lists the commands under headings instead of by name."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        told = {name for names in _CHAPTERS.values() for name in names}
        rest = tuple(name for name in self.list_commands(ctx) if name not in told)
        for chapter, names in {**_CHAPTERS, "More": rest}.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            rows = [(name, command.get_short_help_str(72)) for name, command in commands if command]
            if rows:
                with formatter.section(chapter):
                    formatter.write_dl(rows)


@click.group(
    cls=_Chaptered,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="hotdesk", message="hotdesk %(version)s")
def main() -> None:
    """A self-hosted runtime for customer-service chat, in which all behaviour is plugins.

    Drop a Python file into plugins/ and it answers; save it again and the new code answers, with no
    restart and no message lost. Break it and the last good one goes on serving.

    `hotdesk COMMAND --help` tells the rest of each command.
    """


for _command in (run, init, new, check, push, plugins, chat, workers, restart, dead_letters):
    main.add_command(_command)
