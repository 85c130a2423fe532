"""The Redis that all hosts of a run share, one server, a Sentinel set or a Cluster: what is asked of it, its faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from redis.crc import key_slot
from tests.chaos.power import PoweredRedis, can_lose_power
from tests.redis_servers import Cluster, RedisServer, ReplyError, SentinelSet
from tests.redis_servers.resp import Argument, Reply
from tests.redis_servers.server import Fsync

__all__ = ["Keyed", "SharedRedis", "Topology", "open_shared_redis"]

Topology = Literal["one", "sentinel", "cluster"]

Keyed = tuple[str, Sequence[Argument]]
"""A key, and the command that is about it."""

ASK_S = 2.0


class SharedRedis(Protocol):
    """What a run needs of the servers, whichever way they stand together."""

    url: str
    faults: tuple[str, ...]
    """What may be done to it: `kill`, `freeze`, `lose power`, `fail over`."""

    link_to: RedisServer | None
    """The server that a link may be put in front of; None where clients are told addresses."""

    async def ask(self, commands: Sequence[Keyed]) -> list[Reply]:
        """Have each command done by who has its key. Raises `OSError` and `EOFError` while somebody is away."""

    async def victim(self) -> RedisServer:
        """A server whose loss is felt: one that takes writes."""

    async def fail_over(self) -> None:
        """Kill one that takes writes; another takes its place, and it comes back as a replica."""

    async def wait_ready(self) -> None:
        """Wait until the servers have settled who follows whom: before that nobody can confirm a write."""


class _One:
    def __init__(self, server: RedisServer) -> None:
        self.faults: tuple[str, ...] = ("kill", "freeze")
        if isinstance(server, PoweredRedis):
            self.faults += ("lose power",)
        self.link_to: RedisServer | None = server
        self.url = server.url
        self._server = server

    async def ask(self, commands: Sequence[Keyed]) -> list[Reply]:
        return await _pipeline(self._server, [command for _, command in commands])

    async def victim(self) -> RedisServer:
        return self._server

    async def fail_over(self) -> None:
        raise NotImplementedError("one server has nobody to take its place")

    async def wait_ready(self) -> None:
        pass


class _Watched:
    faults = ("freeze", "fail over")
    link_to: RedisServer | None = None

    def __init__(self, servers: SentinelSet) -> None:
        # Of two replicas one may be behind, and Sentinel, which goes by what it saw last, make that one the master.
        self.url = f"{servers.url}?replicas=1"
        self._servers = servers

    async def ask(self, commands: Sequence[Keyed]) -> list[Reply]:
        return await _pipeline(await self._servers.master(), [command for _, command in commands])

    async def victim(self) -> RedisServer:
        return await self._servers.master()

    async def fail_over(self) -> None:
        old = await self._servers.master()
        await self._servers.failover()
        await old.start()
        await self.wait_ready()

    async def wait_ready(self) -> None:
        await self._servers.wait_ready()


class _Sharded:
    faults = ("freeze", "fail over")
    link_to: RedisServer | None = None

    def __init__(self, cluster: Cluster) -> None:
        self.url = f"{cluster.url}?replicas=1"
        self._cluster = cluster
        self._turn = 0

    async def ask(self, commands: Sequence[Keyed]) -> list[Reply]:
        found: list[Reply] = [None] * len(commands)
        groups: dict[int, list[int]] = {}
        spans = await self._spans()
        for number, (key, _) in enumerate(commands):
            slot = key_slot(key.encode())
            port = next((port for first, last, port in spans if first <= slot <= last), None)
            if port is None:
                raise ConnectionError(f"nobody owns slot {slot}")
            groups.setdefault(port, []).append(number)
        for port, numbers in groups.items():
            node = next(node for node in self._cluster.nodes if node.port == port)
            replies = await _pipeline(node, [commands[number][1] for number in numbers])
            for number, reply in zip(numbers, replies, strict=True):
                found[number] = reply
        return found

    async def _spans(self) -> list[tuple[int, int, int]]:
        node = next(node for node in self._cluster.nodes if node.running)
        slots = await node.command("CLUSTER", "SLOTS", timeout_s=ASK_S)
        return [(first, last, owner[1]) for first, last, owner, *_ in slots]

    async def victim(self) -> RedisServer:
        """Another master each time."""
        ports = sorted({port for _, _, port in await self._spans()})
        self._turn += 1
        return next(node for node in self._cluster.nodes if node.port == ports[self._turn % len(ports)])

    async def fail_over(self) -> None:
        old = await self.victim()
        await self._cluster.failover(old)
        await old.start()
        await self.wait_ready()

    async def wait_ready(self) -> None:
        await self._cluster.wait_ready()


async def _pipeline(server: RedisServer, commands: Sequence[Sequence[Argument]]) -> list[Reply]:
    async with await server.open() as connection:
        replies = await connection.pipeline(commands, timeout_s=ASK_S)
    for reply in replies:
        if isinstance(reply, ReplyError):  # LOADING, MOVED: it is not the one to ask just now
            raise ConnectionError(str(reply))
    return replies


@asynccontextmanager
async def open_shared_redis(topology: Topology, *, fsync: Fsync, address: str) -> AsyncIterator[SharedRedis]:
    """Start the servers on *address*; they are gone at the end."""
    if topology == "one":
        kind = RedisServer if can_lose_power() else PoweredRedis
        async with kind(appendfsync=fsync, address=address) as server:
            yield _One(server)
    elif topology == "sentinel":
        async with SentinelSet(replicas=1, appendfsync=fsync, address=address) as servers:
            yield _Watched(servers)
    else:
        async with Cluster(replicas=1, appendfsync=fsync, address=address) as cluster:
            yield _Sharded(cluster)
