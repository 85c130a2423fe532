"""Starts what the language-model runs need: the model server, a desk whose only plugin is `chatgpt`, the bare bot."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tests.load.client import HttpClient
from tests.load.hosts import Server, free_port, host_on, work_folder

__all__ = ["ModelStats", "read_stats", "running_bot", "running_desk", "running_model", "running_relay"]

HERE = Path(__file__).parent
PLUGINS = HERE.parents[1] / "plugins"


@dataclass(frozen=True, slots=True)
class ModelStats:
    """What the model server was asked so far."""

    requests: int
    messages: int


@asynccontextmanager
async def running_model() -> AsyncIterator[Server]:
    """The lean model server, a process of its own."""
    async with _running("model", lambda port: [str(HERE / "llm_model.py"), str(port)]) as server:
        yield server


@asynccontextmanager
async def running_bot(base_url: str) -> AsyncIterator[Server]:
    """The bare bot, whose model server is at *base_url*."""
    async with _running("bot", lambda port: [str(HERE / "llm_bare.py"), str(port), base_url]) as server:
        yield server


@asynccontextmanager
async def running_relay(model: Server) -> AsyncIterator[Server]:
    """What only copies bytes between the model server and whoever connects."""
    async with _running("relay", lambda port: [str(HERE / "llm_relay.py"), str(port), str(model.port)]) as server:
        yield server


@asynccontextmanager
async def running_desk(name: str, base_url: str, settings: str = "") -> AsyncIterator[Server]:
    """A desk as `make run` gives it, but with `chatgpt` alone, asking the model server at *base_url*.

    The plugin is as it is bundled: it streams, and offers the model its tool `hand_over`. *settings* is more of
    `hotdesk.toml`, whole lines.
    """
    plugins = {path.name: path.read_text() for path in (PLUGINS / "chatgpt.py", PLUGINS / "chatgpt.toml")}
    with work_folder(name) as folder:
        (folder / "hotdesk.toml").write_text(f'{settings}\n[llm]\nbase_url = "{base_url}"\n')
        async with AsyncExitStack() as stack:
            server = host_on(folder, plugins)
            stack.push_async_callback(server.stop)
            await server.start()
            yield server


@asynccontextmanager
async def _running(name: str, command: Callable[[int], list[str]]) -> AsyncIterator[Server]:
    with work_folder(name) as folder:
        port = free_port()
        server = Server([sys.executable, *command(port)], port=port, folder=folder)
        try:
            await server.start()
            yield server
        finally:
            await server.stop()


async def read_stats(model: Server) -> ModelStats:
    client = HttpClient(model.port)
    try:
        return msgspec.json.decode((await client.request("GET", "/stats")).body, type=ModelStats)
    finally:
        client.close()
