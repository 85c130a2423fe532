"""The real runtime in an author's own test: behind `hotdesk_sdk.testing.Desk`, found by its entry point."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from hotdesk_sdk import Attachment, Intake, Message, Request, Sender, Tool, ToolCall, parse_manifest

from .app import Host, open_host
from .backend import StoredReply
from .chat.intake import Accepted, NewMessage
from .chat.outbox import Event
from .chat.tools import ToolCalls
from .chat.turn import Ended
from .config import Config, LlmSettings, ModelSettings, PluginSettings
from .errors import LoadFailed
from .runtime.entries import Entry
from .runtime.sources import Source
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
                wasm_cache=_native_code(),
                wasm_baseline=False,  # compiled once, and kept for the desks that follow
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
        source = _source(path)
        for name, data in _files(source).items():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        manifest = source.manifest_path
        raw = manifest.read_bytes() if manifest.exists() else None
        return source.name, parse_manifest(source.name, raw, file=str(manifest)).capabilities

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

    async def write(self, name: str, source: str | bytes) -> Entry | None:
        """Change a file the way an editor does, and wait until the change serves or is refused.

        None, at once, when *name* is not a plugin's file: nothing comes of such a file by itself.
        """
        plugin, _, ending = name.partition("/")[0].rpartition(".")
        plugin = plugin or ending
        data = source.encode() if isinstance(source, str) else source
        if "/" not in name and ending not in ("py", "toml", "wasm"):
            self._put(name, data)
            return None
        return await self._changed(plugin, lambda: self._put(name, data), 10.0)

    async def replace(self, path: str | Path, *, timeout: float = 60.0) -> Entry:
        """Put the plugin at *path* in the place of the one that has its name, and wait as `write` does."""
        source = _source(Path(path))
        files = _files(source)

        def put() -> None:  # in one go: the host is on this loop, and sees the files when it is done
            for name, data in files.items():
                self._put(name, data)
            self._sweep(source.name, {self.folder / name for name in files})

        return await self._changed(source.name, put, timeout)

    def _put(self, name: str, data: bytes) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        fresh.write_bytes(data)
        fresh.replace(target)

    def _sweep(self, plugin: str, keep: set[Path]) -> None:
        """Delete what was there of *plugin* before, but for *keep*."""
        for path in self.folder.iterdir():
            if path.is_dir() and path.name == plugin:
                for inner in sorted(path.rglob("*"), reverse=True):
                    if inner.is_file() and inner not in keep:
                        inner.unlink()
                if not any(one.is_relative_to(path) for one in keep):
                    shutil.rmtree(path)
            elif path.is_file() and path.stem == plugin and path not in keep:
                path.unlink()

    async def _changed(self, plugin: str, change: Callable[[], None], timeout: float) -> Entry:
        heard = asyncio.Event()
        stop = self.host.events.listen(lambda event: heard.set() if _is_outcome(event, plugin) else None)
        try:
            change()
            async with asyncio.timeout(timeout):
                await heard.wait()
        finally:
            stop()
        return self.host.plugins.entry(plugin)

    @property
    def tools(self) -> dict[str, Tool]:
        return {name: loaded.tool for name, (_, _, loaded) in self._toolbox().by_name.items()}

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> str:
        calls = ToolCalls(self.host.turns._calls, self.host.metrics)
        asked = ToolCall("test", name, msgspec.json.encode(dict(arguments)).decode())
        toolbox = self._toolbox()
        turn: Any = None  # there is none, so a function that wants one gets none
        [result] = await calls.run(turn, toolbox, frozenset(toolbox.by_name), [asked])
        return result

    def _toolbox(self) -> Any:
        return self.host.turns._active.current.tools

    @property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(self.host.events.recent)

    def metric(self, name: str, **labels: str) -> float:
        return self.host.metrics.registry.get_sample_value(name, labels) or 0.0


def _source(path: Path) -> Source:
    """The plugin that *path* names: its file, its folder, or what is in its folder."""
    path = path.resolve()
    if path.name in ("__init__.py", "plugin.toml", "plugin.wasm"):
        path = path.parent
    if not path.exists():
        raise FileNotFoundError(f"there is no plugin at {path}")
    return Source(path.name, path, "folder") if path.is_dir() else Source(path.stem, path, path.suffix[1:])


def _files(source: Source) -> dict[str, bytes]:
    """Its files, by their paths below the folder of plugins."""
    base = source.path.parent
    found = source.files()
    if source.kind == "folder" and source.wasm_path is None:  # tests and data that lie beside it too
        found = [path for path in source.path.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in found}


def _is_outcome(event: Mapping[str, Any], plugin: str) -> bool:
    kinds = ("plugin_loaded", "plugin_swapped", "plugin_failed", "plugin_configured", "plugin_waiting")
    return event["kind"] in kinds and event.get("plugin") == plugin


@functools.cache
def _native_code() -> str:
    """Where components' native code is kept: all the desks of one process compile a component once."""
    folder = tempfile.mkdtemp(prefix="hotdesk-native-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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
