"""The shelf in Redis: plugins that were pushed, their bytes, and what each worker says of its own.

It keeps bytes and knows nothing of what they say. All keys are below `PREFIX{shelf}:`, so that one script sees them:

plugins    hash    NAME: its record
b:NAME     hash    HASH:n, the n-th part of a version's bytes
reports    hash    WORKER: the number of its report, when that was (Unix seconds), and the report
count      string  reports so far
news       channel the name of what was published

Bytes travel in parts, one at a time: a large plugin must not keep a worker's heartbeat waiting, which goes the same
way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from redis.crc import key_slot

from .redis_members import members_keys
from .redis_partitions import Calls
from .redis_servers import Servers, open_servers
from .redis_url import read_redis_url
from .redis_wire import Scripts, Way

__all__ = ["RedisShelf"]

PART_BYTES = 512 * 1024

FORGET_S = 60
"""A report whose worker has not been alive for so long is deleted. A worker reports before it begins to live."""


class RedisShelf:
    """See `runtime.shelf.Shelf` for what is promised. *me* is the worker; empty for one who only looks and pushes."""

    def __init__(self, prefix: str, servers: Servers, calls: Calls, me: str = "") -> None:
        base = f"{prefix}{{shelf}}:"
        self.channel = f"{base}news"
        self._base = base
        self._members = members_keys(prefix)
        self._servers = servers
        self._calls = calls
        self._me = me
        self._slot: int = key_slot(base.encode())
        self._members_slot: int = key_slot(self._members[0].encode())
        self._heard: Callable[[str], None] | None = None
        self._count = 0
        self._reports: dict[str, bytes] = {}
        self._said_at: dict[str, int] = {}

    @classmethod
    async def open(cls, url: str) -> RedisShelf:
        """The shelf alone, for a command. Raises `BackendError`."""
        read = read_redis_url(url)
        scripts = Scripts()
        servers = open_servers(read, scripts, _Deaf())
        return cls(read.prefix, servers, Calls(servers, scripts))

    async def aclose(self) -> None:
        """Close what `open` opened."""
        await self._servers.aclose()

    def _script(self, name: str, keys: tuple[str, ...], *args: Any, way: Way = Way.ASIDE) -> asyncio.Future[Any]:
        return self._calls.script(name, self._slot, tuple(self._base + key for key in keys), *args, way=way)

    # -- plugins ---------------------------------------------------------------------------------------------

    async def read(self) -> tuple[dict[str, bytes], bool]:
        rows, reported = await self._script("shelf_look", ("plugins", "reports"), self._me)
        records = {_text(name): record for name, record in zip(rows[::2], rows[1::2], strict=True)}
        return records, bool(reported)

    async def fetch(self, name: str, hash: str, size: int) -> bytes | None:
        parts: list[bytes] = []
        for number in range(_parts(size)):
            part = await self._script("shelf_part", (f"b:{name}",), f"{hash}:{number}", PART_BYTES)
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)

    async def publish(
        self, name: str, record: bytes, *, over: bytes, hash: str, data: bytes, keep: Collection[str]
    ) -> bool:
        for number in range(_parts(len(data))):
            part = data[number * PART_BYTES : (number + 1) * PART_BYTES]
            await self._calls.command(self._slot, "HSET", f"{self._base}b:{name}", f"{hash}:{number}", part)
        published = await self._script(
            "shelf_publish", ("plugins", f"b:{name}"), self.channel, name, over, record, hash, _parts(len(data)), *keep,
            way=Way.TURNS,
        )  # fmt: skip
        return bool(published == 1)

    # -- news ------------------------------------------------------------------------------------------------

    def follow(self, heard: Callable[[str], None]) -> None:
        self._heard = heard
        self._servers.subscribe(self.channel)

    def on_news(self, data: bytes) -> None:
        if self._heard is not None:
            self._heard(_text(data))

    def on_confirmed(self) -> None:
        """The channel is heard, for the first time or again: what was said before was not."""
        if self._heard is not None:
            self._heard("")

    # -- reports ---------------------------------------------------------------------------------------------

    async def report(self, body: bytes) -> None:
        await self._script("shelf_report", ("reports", "count"), self._me, body)

    async def retire(self) -> None:
        await self._calls.command(self._slot, "HDEL", f"{self._base}reports", self._me)

    async def reports(self) -> dict[str, bytes | None]:
        alive = await self._alive()
        count, now, names, fresh = await self._script("shelf_reports", ("reports", "count"), self._count)
        self._count = count
        for worker, value in zip(fresh[::2], fresh[1::2], strict=True):
            _, at, body = value.split(b" ", 2)
            self._reports[_text(worker)], self._said_at[_text(worker)] = body, int(at)
        there = {_text(name) for name in names}
        for worker in self._reports.keys() - there:
            del self._reports[worker], self._said_at[worker]
        gone = [one for one in self._reports if one not in alive and int(now) - self._said_at[one] > FORGET_S]
        if gone:
            await self._calls.command(self._slot, "HDEL", f"{self._base}reports", *gone)
        return {worker: self._reports.get(worker) for worker in alive}

    async def _alive(self) -> set[str]:
        """The workers whose lease has not run out, as a beat of nobody tells."""
        *_, living = await self._calls.script("beat", self._members_slot, self._members, "", 0, "", "", way=Way.ASIDE)
        return {_text(name) for name in living}


class _Deaf:
    """Hears nothing: a command asks for what it wants to know."""

    def on_news(self, channel: str, data: bytes) -> None: ...
    def on_confirmed(self, channel: str) -> None: ...
    def on_open(self) -> None: ...
    def on_close(self) -> None: ...
    def on_batch(self, commands: int, seconds: float) -> None: ...


def _parts(size: int) -> int:
    return -(-size // PART_BYTES)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
