"""The real runtime in an author's own test: behind `hotdesk_sdk.testing.Desk`, found by its entry point."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from hotdesk_sdk import Attachment, Intake, Message, Request, Sender, parse_manifest

from .app import Host, open_host
from .backend import StoredReply
from .chat.intake import Accepted, NewMessage
from .chat.outbox import Event
from .chat.turn import Ended
from .config import Config, LlmSettings, ModelSettings, PluginSettings
from .errors import LoadFailed
from .runtime.entries import Entry
from .web.webhooks import read_intake

__all__ = ["Desk", "Said"]


class Said(msgspec.Struct, frozen=True):
    """What became of one message: the reply's parts, empty when nobody answered."""

    text: str
    replies: tuple[StoredReply, ...]
    chunks: tuple[str, ...]
    error: tuple[str, str] | None

    def __bool__(self) -> bool:
        return bool(self.replies)

    @property
    def plugin(self) -> str | None:
        return self.replies[0].plugin if self.replies else None

    @property
    def generation(self) -> int | None:
        return self.replies[0].generation if self.replies else None

    @property
    def metadata(self) -> dict[str, Any]:
        return self.replies[0].metadata if self.replies else {}


class Desk:
    """See `hotdesk_sdk.testing.Desk`."""

    def __init__(
        self,
        paths: list[Path],
        config: Mapping[str, Mapping[str, Any]],
        grant: Mapping[str, tuple[str, ...]] | None,
        llm: str | Mapping[str, Any] | None = None,
    ) -> None:
        self._llm = {"base_url": llm} if isinstance(llm, str) else llm
        self._paths = paths
        self._plugin_config = config
        self._grant = grant
        self._stack = contextlib.AsyncExitStack()
        self.host: Host
        self.folder: Path

    async def __aenter__(self) -> Desk:
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hotdesk-test-")))
            self.folder = folder / "plugins"
            self.folder.mkdir()
            settings = {}
            for path in self._paths:
                name, asked = self._place(path)
                grant = asked if self._grant is None else self._grant.get(name, ())
                settings[name] = PluginSettings(grant=grant, config=dict(self._plugin_config.get(name, {})))
            models = {} if self._llm is None else {"default": msgspec.convert(self._llm, ModelSettings)}
            config = Config(
                plugins=(str(self.folder),),
                data=str(folder / "data"),
                plugin_settings=settings,
                llm=LlmSettings(models=models),
            )
            self.host = await self._stack.enter_async_context(open_host(config, serve=False))
            for entry in self.host.plugins.entries:
                if entry.problem is not None:
                    text = entry.problem.message.removeprefix(f"plugin '{entry.name}': ")
                    raise LoadFailed(entry.name, entry.problem.step, text)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _place(self, path: Path) -> tuple[str, tuple[str, ...]]:
        """Copy a plugin into the desk's folder: its name, and the capabilities that it asks for."""
        path = path.resolve()
        if path.name in ("__init__.py", "plugin.toml"):
            path = path.parent
        if path.is_dir():
            manifest = path / "plugin.toml"
            shutil.copytree(path, self.folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            manifest = path.with_suffix(".toml")
            shutil.copy(path, self.folder)
            if manifest.exists():
                shutil.copy(manifest, self.folder)
        else:
            raise FileNotFoundError(f"there is no plugin at {path}")
        name = path.name if path.is_dir() else path.stem
        raw = manifest.read_bytes() if manifest.exists() else None
        return name, parse_manifest(name, raw, file=str(manifest)).capabilities

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
        chunks: list[str] = []
        outcome: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()

        def told(accepted: Accepted | BaseException) -> None:
            if isinstance(accepted, BaseException):
                outcome.set_exception(accepted)
                return
            if accepted.turn is not None:
                accepted.turn.watchers = [hear, *(accepted.turn.watchers or ())]
            outcome.set_result(accepted)

        def hear(event: Event) -> None:
            if event.kind == "chunk":
                chunks.append(event.data.text)

        new = NewMessage(conversation, text, id, Sender(sender), tuple(attachments), metadata or {})
        self.host.intake.accept_nowait(new, told, door="test")
        accepted = await outcome
        if accepted.turn is None:
            past = await self.host.backend.outcome(conversation, accepted.seq, accepted.id)
            return Said(past.replies[0].text if past.replies else "", past.replies, (), None)
        async with asyncio.timeout(timeout):
            ended = await accepted.turn.wait_ended() or Ended(())
        return Said(ended.replies[0].text if ended.replies else "", ended.replies, tuple(chunks), ended.error)

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
        request = Request(
            method,
            path,
            dict(query or {}),
            {name.lower(): value for name, value in (headers or {}).items()},
            body.encode() if isinstance(body, str) else body,
        )
        return read_intake(await self.host.turns.background.call_plugin(plugin, "intake", request))

    async def record(self, conversation: str = "test") -> list[Message | StoredReply]:
        return await self.host.backend.read(conversation, 0, 1000) or []

    async def write(self, name: str, source: str) -> Entry | None:
        """Change a file the way an editor does, and wait until the change serves or is refused.

        None, at once, when *name* is not a plugin's `.py` or `.toml`: nothing comes of such a file by itself.
        """
        plugin, _, ending = name.partition("/")[0].rpartition(".")
        plugin = plugin or ending
        heard = asyncio.Event()
        stop = self.host.events.listen(lambda event: heard.set() if _is_outcome(event, plugin) else None)
        try:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(f".{target.name}.new")
            fresh.write_text(source)
            fresh.replace(target)
            if "/" not in name and ending not in ("py", "toml"):
                return None
            async with asyncio.timeout(10.0):
                await heard.wait()
        finally:
            stop()
        return self.host.plugins.entry(plugin)


def _is_outcome(event: Mapping[str, Any], plugin: str) -> bool:
    kinds = ("plugin_loaded", "plugin_swapped", "plugin_failed", "plugin_configured", "plugin_waiting")
    return event["kind"] in kinds and event.get("plugin") == plugin


@contextlib.asynccontextmanager
async def open_desk(
    paths: list[Path],
    config: Mapping[str, Mapping[str, Any]],
    grant: Mapping[str, tuple[str, ...]] | None,
    llm: str | Mapping[str, Any] | None = None,
) -> AsyncIterator[Desk]:
    """The factory that `hotdesk_sdk.testing` finds."""
    async with Desk(paths, config, grant, llm) as desk:
        yield desk
