"""Ways in which Redis is not there for a host, and what came of each message in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from tests.redis_servers import Link, RedisServer

from conftest import Desk

__all__ = ["WAYS", "Reach", "gauge", "kept_in", "post"]

WAYS = ("killed", "frozen", "cut off")


class Reach:
    """A Redis server, and the way to it: `await reach.lose("frozen")`, `await reach.find()`."""

    def __init__(self, server: RedisServer, link: Link) -> None:
        self.server = server
        self.link = link

    @classmethod
    @asynccontextmanager
    async def to(cls, server: RedisServer) -> AsyncIterator[Reach]:
        async with await Link.open(server.port) as link:
            yield cls(server, link)

    @property
    def url(self) -> str:
        return f"{self.server.url_at('127.0.0.1', self.link.port)}?partitions=32"

    async def lose(self, how: str) -> None:
        if how == "killed":
            await self.server.kill()
        elif how == "frozen":
            self.server.freeze()
        else:
            assert how == "cut off"
            self.link.cut()

    async def find(self) -> None:
        """Have it there again; it answers `PING` when this returns."""
        self.server.thaw()
        if not self.server.running:
            await self.server.start()
        await self.link.heal()


async def post(
    http: aiohttp.ClientSession, url: str, conversation: str, text: str = "hello", **fields: Any
) -> tuple[int, dict[str, Any]]:
    """Send a message: the status and the body."""
    async with http.post(f"{url}/v1/conversations/{conversation}/messages", json={"text": text, **fields}) as response:
        body: dict[str, Any] = await response.json()
        if response.status == 503:
            assert response.headers["Retry-After"] == "1"
        return response.status, body


async def gauge(desk: Desk, name: str) -> float:
    """One sample of the host's metrics."""
    async with desk.http.get(f"{desk.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


async def kept_in(http: aiohttp.ClientSession, url: str, conversations: Iterable[str]) -> dict[str, list[str]]:
    """The ids of the messages of each conversation, in order. Every one that ended was answered once, and in order."""
    found: dict[str, list[str]] = {}
    for conversation in conversations:
        path = f"{url}/v1/conversations/{conversation}/messages"
        async with http.get(path, params={"limit": "1000"}) as response:
            entries = (await response.json()).get("messages", [])
        found[conversation] = [entry["id"] for entry in entries if entry["type"] == "message"]
        answered = [entry["to"] for entry in entries if entry["type"] == "reply"]
        assert [seq for seq, n in Counter(entry["seq"] for entry in entries).items() if n > 1] == []
        assert answered == found[conversation][: len(answered)]
    return found
