"""Which Redis server a command goes to, and the connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from redis.asyncio.connection import Connection
from redis.exceptions import ReadOnlyError, RedisError

from .redis_news import News
from .redis_sentinel import Sentinels
from .redis_url import RedisUrl
from .redis_wire import CONNECT_S, Command, Lane, Scripts, Way, connect, own_task

__all__ = ["Hears", "OneServer", "Servers", "Then", "ask", "open_servers"]

LOOK_S = 0.25
"""How often the sentinels are asked whether the master is still the one that is connected to. One that was replaced
and does not know it yet takes writes that are lost: Redis 7.0 lets it for up to 8 s after `SENTINEL FAILOVER`."""


Then = Callable[[Any], tuple[Any, ...] | None]


async def ask(lane: Lane, args: tuple[Any, ...], then: Then | None = None) -> Any:
    """One server's answer to a command without keys; or to what *then* makes of that."""
    while True:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        lane.send(Command(args, future, -1, False))
        answer = await future
        following = None if then is None else then(answer)
        if following is None:
            return answer
        args, then = following, None


class Hears(Protocol):
    """Who is told what comes from the servers."""

    def on_news(self, channel: str, data: bytes) -> None: ...
    def on_confirmed(self, channel: str) -> None:
        """From now on *channel* is heard."""

    def on_open(self) -> None:
        """All channels of a server are heard again: what was said meanwhile was not."""

    def on_close(self) -> None:
        """They are not heard any more."""

    def on_batch(self, commands: int, seconds: float) -> None: ...


class Servers(Protocol):
    """Where commands and channels go, by the slot of their keys."""

    def send(self, command: Command, way: Way = Way.TURNS) -> None: ...

    def subscribe(self, channel: str) -> None: ...
    def unsubscribe(self, channel: str) -> None: ...
    def start_news(self) -> None: ...
    async def wait_news(self) -> None: ...
    async def each(self, *args: Any, then: Then | None = None, failed: bool = False) -> list[Any]:
        """One command to every server; their answers. *then* may make of one what that server is asked instead.

        With *failed* what a server fails with is its answer; else whatever fails first is raised.
        """

    def trouble(self) -> str | None:
        """Why a server can't be reached, while one can't."""

    async def aclose(self) -> None: ...


class OneServer:
    """One server, or the master that Sentinel names."""

    def __init__(self, url: RedisUrl, scripts: Scripts, hears: Hears) -> None:
        self._url = url
        self._scripts = scripts
        self._sentinels = Sentinels(url, scripts) if url.kind == "sentinel" else None
        self._master: tuple[str, int] | None = None
        """Who that is, by the sentinels' last word."""

        self._looking: asyncio.Task[None] | None = None
        lane = partial(Lane, self._connect, name=url.text, scripts=scripts)
        self._lanes = {
            Way.TURNS: lane(replicas=url.replicas, on_batch=hears.on_batch),
            Way.ASIDE: lane(),
            Way.LEASE: lane(),
        }
        self._news = News(
            lambda: self._connect(scripts=False),
            hear=hears.on_news,
            on_open=hears.on_open,
            on_close=hears.on_close,
            confirmed=hears.on_confirmed,
        )

    async def _connect(self, scripts: bool = True) -> Connection:
        wanted = self._scripts if scripts else None
        if self._sentinels is None:
            return await connect(self._url, *self._url.hosts[0], scripts=wanted)
        if self._looking is None:
            self._looking = own_task(self._look(self._sentinels))
        master = await self._sentinels.find_master()
        await self._turn_to(master)
        connection = await connect(self._url, *master, scripts=wanted)
        await self._refuse_replica(connection)
        if master != self._master:
            await connection.disconnect(nowait=True)
            raise ReadOnlyError("the master was replaced while it was connected to")
        return connection

    async def _turn_to(self, master: tuple[str, int]) -> None:
        """*master* is the one now: let go of another, which may not know it yet, or stand still."""
        if master != self._master:
            self._master = master
            await self._lanes[Way.TURNS].drop()
            await self._news.drop()
            await self._lanes[Way.LEASE].drop()
            await self._lanes[Way.ASIDE].drop()

    async def _refuse_replica(self, connection: Connection) -> None:
        """Sentinel may name a master that is one no longer, or not yet."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.send_command("ROLE", check_health=False)
                role = await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        if not isinstance(role, list) or role[0] != b"master":
            await connection.disconnect(nowait=True)
            raise ReadOnlyError("the server that Sentinel names is no master yet")

    async def _look(self, sentinels: Sentinels) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._turn_to(await sentinels.find_master())
            except RedisError:
                pass  # whoever serves is not left for nobody

    def send(self, command: Command, way: Way = Way.TURNS) -> None:
        self._lanes[way].send(command)

    def subscribe(self, channel: str) -> None:
        self._news.subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        self._news.unsubscribe(channel)

    def start_news(self) -> None:
        self._news.start()

    async def wait_news(self) -> None:
        await self._news.wait_open()

    async def each(self, *args: Any, then: Then | None = None, failed: bool = False) -> list[Any]:
        return list(await asyncio.gather(ask(self._lanes[Way.ASIDE], args, then), return_exceptions=failed))

    def trouble(self) -> str | None:
        return self._lanes[Way.TURNS].down

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self._lanes[Way.TURNS].aclose()
        await self._news.aclose()
        await self._lanes[Way.LEASE].aclose()
        await self._lanes[Way.ASIDE].aclose()
        if self._sentinels is not None:
            await self._sentinels.aclose()


def open_servers(url: RedisUrl, scripts: Scripts, hears: Hears) -> Servers:
    """The servers of *url*; each is connected to when it is needed."""
    if url.kind == "cluster":
        from .redis_cluster import ManyServers  # which imports this module

        return ManyServers(url, scripts, hears)
    return OneServer(url, scripts, hears)
