"""Run a plugin in a test of your own, on the real runtime, with nothing to set up.

    async def test_refund():
        async with Desk.with_plugin("faq.py") as desk:
            assert "three days" in (await desk.say("refund?")).text

Needs the package `hotdesk` installed: it is found by its entry point, not imported from here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from .context import StoredReply
from .messages import Attachment, Intake, Message, Tool

__all__ = ["Desk", "Said"]


class Said(Protocol):
    """What became of one message. False when nobody answered."""

    @property
    def text(self) -> str: ...
    @property
    def replies(self) -> tuple[StoredReply, ...]: ...
    @property
    def chunks(self) -> tuple[str, ...]: ...
    @property
    def error(self) -> tuple[str, str] | None: ...
    @property
    def plugin(self) -> str | None: ...
    @property
    def generation(self) -> int | None: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    def __bool__(self) -> bool: ...


class Desk(Protocol):
    """A host in memory with the plugins of one test: no port, and a journal that goes with it."""

    @staticmethod
    def with_plugin(
        *paths: str | Path,
        config: Mapping[str, Any] | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        grant: Mapping[str, tuple[str, ...]] | None = None,
        llm: str | Mapping[str, Any] | None = None,
    ) -> AbstractAsyncContextManager[Desk]:
        """A desk with the plugins at *paths* (a file, or a folder), relative to the working folder or to the test.

        *config* goes over the first plugin's `[config]`, *configs* over each by name. *grant* is what each
        plugin is granted; by default all that it asks for. *llm* is the URL of a model server, or what `[llm]` would
        say. Raises the load's error when one does not load.
        """
        if not paths:
            raise TypeError("with_plugin: name at least one plugin's file or folder")
        caller = Path(sys._getframe(1).f_code.co_filename).parent
        found = [_find(Path(path), caller) for path in paths]
        configs = dict(configs or {})
        if config is not None:
            first = found[0].parent if found[0].name in ("__init__.py", "plugin.toml", "plugin.wasm") else found[0]
            configs[first.name if first.is_dir() else first.stem] = config
        return _factory()(found, configs, grant, llm)  # type: ignore[no-any-return]

    async def say(
        self,
        text: str,
        *,
        conversation: str = "test",
        id: str | None = None,
        sender: str = "",
        metadata: dict[str, Any] | None = None,
        attachments: Sequence[Attachment] = (),
        timeout: float = 10.0,
    ) -> Said:
        """Send a message and wait for its turn's end."""

    async def webhook(
        self,
        plugin: str,
        body: bytes | str = b"",
        *,
        method: str = "POST",
        path: str = "/",
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Intake:
        """Hand a request to the plugin's `intake` and return what it found; nothing is taken in."""

    async def record(self, conversation: str = "test") -> list[Message | StoredReply]:
        """Everything said in a conversation, oldest first."""

    async def write(self, name: str, source: str | bytes) -> Any:
        """Replace a plugin's file and wait until the change serves or is refused; None if it is no plugin's.

        A manifest of which only `[config]` differs goes to `configure`, as an operator's change does.
        """

    async def replace(self, path: str | Path, *, timeout: float = 60.0) -> Any:
        """Put the plugin at *path* in the place of the one that has its name, and wait as `write` does.

        Both may be of any kind: a file of Python, a `.wasm`, a folder. *path* has another version: what differs in
        nothing is no change, and nothing comes of it.
        """

    @property
    def tools(self) -> Mapping[str, Tool]:
        """What the language model is offered, by name."""

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Call a tool as the language model would, beside any turn; gives what it would be told, errors too."""

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """What the operator was told of plugins, oldest first, as `GET /admin/events` has it."""

    def metric(self, name: str, **labels: str) -> float:
        """What `/metrics` says; 0 for what was never counted."""


def _find(path: Path, caller: Path) -> Path:
    for candidate in (path, caller / path):
        if candidate.exists():
            return candidate.resolve()
    raise FileNotFoundError(f"there is no plugin at {path}, seen from {Path.cwd()} or {caller}")


def _factory() -> Any:
    for entry in entry_points(group="hotdesk_sdk.testing", name="open_desk"):
        return entry.load()
    raise RuntimeError("hotdesk_sdk.testing runs plugins on the real runtime: pip install hotdesk")
