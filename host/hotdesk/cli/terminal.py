"""Both ends of `hotdesk chat`: lines from a person or a pipe, and replies that may come at any moment.

Owns stdin, stdout and the terminal's state; knows nothing of hosts.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import click
import msgspec
from rich.console import Console

try:
    import readline
except ImportError:  # Windows: the console edits lines itself
    readline = None  # type: ignore[assignment]

__all__ = ["Lines", "Screen"]

PROMPT = "› "


def _safe(text: str) -> str:
    """*text* without what would steer the terminal; a bot may repeat anything that a visitor wrote."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class Lines:
    """Lines from stdin, asked for one at a time: with editing on a terminal, as they are from a pipe.

    The reading is done by a daemon thread, because nothing else can be left while it blocks. `aclose`
    puts the terminal back as it was even when that thread still waits.
    """

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.prompting = False
        self._wanted: queue.SimpleQueue[Callable[[str | None], None]] = queue.SimpleQueue()
        self._rest = b""
        self._terminal = _save_terminal() if self.interactive else None
        threading.Thread(target=self._read, name="hotdesk-chat-stdin", daemon=True).start()

    async def next(self) -> str | None:
        """The next line without its end, or None at the end of the input."""
        loop = asyncio.get_running_loop()
        line: asyncio.Future[str | None] = loop.create_future()

        def give(text: str | None) -> None:
            try:
                loop.call_soon_threadsafe(lambda: None if line.done() else line.set_result(text))
            except RuntimeError:  # the loop is gone: nobody waits any more
                pass

        self.prompting = self.interactive
        self._wanted.put(give)
        text = await line
        # At the end of the input, or when the wait is given up, the cursor still stands behind the prompt.
        self.prompting = self.prompting and text is None
        return text

    def typed(self) -> str:
        """What stands behind the prompt and was not sent yet."""
        return readline.get_line_buffer() if self.prompting and readline is not None else ""

    def close(self) -> None:
        if self._terminal is not None:
            self._terminal()

    def _read(self) -> None:
        while True:
            give = self._wanted.get()
            try:
                give(input(PROMPT) if self.interactive else self._from_pipe())
            except (EOFError, OSError):
                give(None)

    def _from_pipe(self) -> str | None:
        # Not sys.stdin: a thread that waits inside its buffer makes the interpreter abort when it leaves.
        while b"\n" not in self._rest:
            part = os.read(0, 65536)
            if not part:
                line, self._rest = self._rest, b""
                return line.decode(errors="replace") if line else None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.removesuffix(b"\r").decode(errors="replace")


def _save_terminal() -> Callable[[], None] | None:
    try:
        import termios
    except ImportError:
        return None
    before = termios.tcgetattr(0)
    return lambda: termios.tcsetattr(0, termios.TCSADRAIN, before)


class Screen:
    """Where a chat is shown. One reply may be half shown while its chunks come; everything else waits on new lines."""

    def __init__(self, lines: Lines, *, as_json: bool) -> None:
        self._lines = lines
        self._json = as_json
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)
        self._open: str | None = None
        self._shown = ""

    def chunk(self, message: str, index: int, text: str) -> None:
        """The next piece of the answer to *message*. Index 0 again: it is being answered anew.

        An answer whose beginning went by during a lost connection is shown whole, by its reply.
        """
        if self._json or self._lines.prompting or (self._open != message and index != 0):
            return
        if self._open != message:
            self._end_open()
            self._open = message
        elif index == 0 and self._shown:
            self.note("(answered anew)")
            self._open = message
        self._shown += text
        self._print(_safe(text))

    def reply(self, frame: Mapping[str, Any]) -> None:
        """A whole reply: what was not shown of it yet, and behind it who answered."""
        if self._json:
            self._print_json(frame)
            return
        text = str(frame.get("text", ""))
        if self._open is not None and self._open == frame.get("to") and text.startswith(self._shown):
            text = text[len(self._shown) :]
            self._open, self._shown = None, ""
        else:
            self._end_open()
        with _Above(self):
            self._print(_safe(text))
            self._print(f"  [{_safe(str(frame.get('plugin', '?')))} {frame.get('generation', '?')}]\n", style="dim")

    def problem(self, frame: Mapping[str, Any]) -> None:
        """An `error` frame."""
        if self._json:
            self._print_json(frame)
            return
        self._end_open()
        with _Above(self):
            code, message = _safe(str(frame.get("code", "error"))), _safe(str(frame.get("message", "")))
            self._err.print(f"{message} ({code})", style="red")
            if hint := frame.get("hint"):
                self._err.print(_safe(str(hint)), style="dim")

    def note(self, text: str) -> None:
        """Something about the connection; never part of the conversation, so it goes to stderr."""
        self._end_open()
        with _Above(self):
            self._err.print(_safe(text), style="dim")

    def end(self) -> None:
        """Leave the cursor on a line of its own."""
        self._end_open()
        if self._lines.prompting:
            self._lines.prompting = False
            self._print("\n")

    def _end_open(self) -> None:
        if self._open is not None:
            self._open, self._shown = None, ""
            self._print("\n")

    def _print(self, text: str, style: str = "") -> None:
        if text:
            self._out.print(text, end="", style=style or None)
            self._out.file.flush()

    def _print_json(self, frame: Mapping[str, Any]) -> None:
        click.echo(msgspec.json.encode(frame))


class _Above:
    """Prints above the prompt: takes it away, and puts it back with what was typed."""

    def __init__(self, screen: Screen) -> None:
        self._lines = screen._lines

    def __enter__(self) -> None:
        if self._lines.prompting:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()

    def __exit__(self, *exc: object) -> None:
        if self._lines.prompting:
            sys.stdout.write(PROMPT + self._lines.typed())
            sys.stdout.flush()
