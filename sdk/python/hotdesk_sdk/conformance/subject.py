"""The plugin under test as cases want it: in a folder of its own, by the name `orders`, beside a neighbour."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ..testing import Desk

__all__ = ["NAME", "ClaimFailed", "Subject", "expect", "expect_in", "wait_for"]

NAME = "orders"
WORDS = ("damn", "heck")

NEIGHBOUR = """
import json
from hotdesk_sdk import hookimpl


@hookimpl
async def respond(turn):
    word, _, rest = turn.text.partition(" ")
    if word == "echo":
        return rest
    if word == "stream":
        return pieces(rest.split("|"))
    if word == "known":
        return json.dumps({"tags": turn.conversation.tags, "state": turn.conversation.state})
    return f"The neighbour heard: {turn.text}"


async def pieces(texts):
    for text in texts:
        yield text
"""
"""A bot further in: it says what it is told, whole or in pieces, and what is known of the conversation."""


OLD = """
from hotdesk_sdk import hookimpl


@hookimpl
async def export_state():
    return {state!r}


@hookimpl
async def respond(turn):
    return "The old one."
"""

NEXT = """
import json
from hotdesk_sdk import hookimpl

given = []


@hookimpl
async def import_state(state):
    given.append(state)


@hookimpl
async def respond(turn):
    return json.dumps(given)
"""


class ClaimFailed(AssertionError):
    """The plugin did something else than the claim says; the text has both."""


class Subject:
    """The plugin at *path*. *folder* is empty, and goes with the case."""

    def __init__(self, path: Path, folder: Path) -> None:
        if path.is_dir():
            path = path / ("plugin.wasm" if (path / "plugin.wasm").exists() else "__init__.py")
        self._path = path
        self._folder = folder

    @property
    def is_component(self) -> bool:
        return self._path.suffix == ".wasm"

    def place(
        self,
        *,
        version: str = "1.0.0",
        words: Any = WORDS,
        on_failure: str = "skip",
        capabilities: Sequence[str] = (),
    ) -> Path:
        """The plugin with a manifest of its own, at a new place."""
        folder = self._folder / str(len([*self._folder.iterdir()]))
        if self._path.name == "__init__.py":
            target = folder / NAME
            shutil.copytree(self._path.parent, target)
            manifest = target / "plugin.toml"
        else:
            target = folder / f"{NAME}{self._path.suffix}"
            folder.mkdir()
            shutil.copy(self._path, target)
            manifest = target.with_suffix(".toml")
        manifest.write_text(self._manifest(version, words, on_failure, capabilities), "utf-8")
        return target

    def place_old(self, state: Any) -> Path:
        """A version 0 in Python that leaves *state*, and answers everything with "The old one."."""
        return self._place_python("0.1.0", OLD.format(state=state))

    def place_next(self) -> Path:
        """A version 2 in Python that answers everything with the state that it was given, as JSON."""
        return self._place_python("2.0.0", NEXT)

    def _place_python(self, version: str, source: str) -> Path:
        target = self._folder / str(len([*self._folder.iterdir()])) / f"{NAME}.py"
        target.parent.mkdir()
        target.write_text(source)
        target.with_suffix(".toml").write_text(f'version = "{version}"\n')
        return target

    @asynccontextmanager
    async def desk(
        self, plugin: Path | None = None, *, grant: Sequence[str] = (), **manifest: Any
    ) -> AsyncIterator[Desk]:
        """A desk with the plugin, or with *plugin* in its place, and the neighbour behind it."""
        neighbour = self._folder / "neighbour.py"
        neighbour.write_text(NEIGHBOUR)
        neighbour.with_suffix(".toml").write_text("order = 90\n")
        placed = plugin or self.place(**manifest)
        async with Desk.with_plugin(placed, neighbour, grant={NAME: tuple(grant)}) as desk:
            yield desk

    async def configure(self, desk: Desk, words: Any) -> Any:
        """Change the config of the version that serves; the entry that comes of it."""
        folder = self._path.name == "__init__.py"
        name = f"{NAME}/plugin.toml" if folder else f"{NAME}.toml"
        return await desk.write(name, self._manifest("1.0.0", words, "skip", ()))

    @staticmethod
    def _manifest(version: str, words: Any, on_failure: str, capabilities: Sequence[str]) -> str:
        listed = json.dumps(words, ensure_ascii=False)  # TOML has texts and lists of them as JSON does
        asked = json.dumps([*capabilities])
        first = f'version = "{version}"\non_failure = "{on_failure}"\ncapabilities = {asked}\n'
        return f"{first}[config]\nwords = {listed}\n"


def expect(found: object, wanted: object, what: str) -> None:
    """Raises `ClaimFailed` when *found* is not *wanted*."""
    if found != wanted:
        raise ClaimFailed(f"{what}: {found!r}, and should be {wanted!r}")


def expect_in(wanted: str, found: object, what: str) -> None:
    """Raises `ClaimFailed` when the text of *found* has no *wanted* in it."""
    if wanted not in str(found):
        raise ClaimFailed(f"{what}: {str(found)!r}, and should have {wanted!r} in it")


async def wait_for(read: Callable[[], object], wanted: object, what: str, timeout_s: float = 5.0) -> None:
    """Wait until *read* gives *wanted*. Raises `ClaimFailed` when it does not."""
    for _ in range(int(timeout_s / 0.01)):
        if read() == wanted:
            return
        await asyncio.sleep(0.01)
    expect(read(), wanted, what)
