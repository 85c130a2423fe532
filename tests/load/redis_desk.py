"""Hosts on a Redis of the run's own, which keeps its file on a real disk, and what a turn costs each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
from tests.load.hosts import Server, host_on, work_folder
from tests.redis_servers import RedisServer

__all__ = ["RedisDesk", "Spent", "cpu_of", "redis_host_on", "running_redis_desk", "shared_out"]

SETTLE_S = 30.0
STILL_S = 1.0
"""Partitions are shared out once none changed hands for so long."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent since some moment: differences count, sums do not."""

    hosts_cpu_us: float
    redis_cpu_us: float
    scripts: float
    commands: float
    """All that Redis carried out: the scripts, and what they call."""

    kib_in: float
    kib_out: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def each(self, count: float) -> Spent:
        """One of *count* equal parts."""
        return Spent(*(value / count for value in astuple(self)))

    def less(self, idle: Spent, seconds: float) -> Spent:
        """Without what *seconds* cost where nothing happens, of which *idle* is one."""
        return Spent(*(a - b * seconds for a, b in zip(astuple(self), astuple(idle), strict=True)))


class RedisDesk:
    """Hosts that share one Redis."""

    def __init__(self, redis: RedisServer, hosts: Sequence[Server]) -> None:
        self.redis = redis
        self.hosts = hosts
        self._told = 0

    async def spent(self) -> Spent:
        """The state of all counters now. What Redis tells for it is not counted."""
        text = str(await self.redis.command("INFO", "cpu", "stats", "commandstats"))
        info = dict(line.partition(":")[::2] for line in text.splitlines())
        told, self._told = self._told, self._told + len(text)
        calls = {name: int(row.split(",", 1)[0][6:]) for name, row in info.items() if name.startswith("cmdstat_")}
        return Spent(
            hosts_cpu_us=sum(map(cpu_of, self.hosts)) * 1e6,
            redis_cpu_us=(float(info["used_cpu_user"]) + float(info["used_cpu_sys"])) * 1e6,
            scripts=calls.get("cmdstat_evalsha", 0),
            commands=sum(calls.values()),
            kib_in=int(info["total_net_input_bytes"]) / 1024,
            kib_out=(int(info["total_net_output_bytes"]) - told) / 1024,
        )

    async def idle(self, seconds: float) -> Spent:
        """What a second costs in which nobody says anything."""
        before = await self.spent()
        await asyncio.sleep(seconds)
        return (await self.spent() - before).each(seconds)


def cpu_of(server: Server) -> float:
    """CPU seconds of a host with all its workers, those alive."""
    total = 0.0
    main = psutil.Process(server.pid)
    for process in (main, *main.children(recursive=True)):
        cpu = process.cpu_times()
        total += cpu.user + cpu.system
    return total


def redis_host_on(folder: Path, plugins: Mapping[str, str], url: str, *, workers: int = 1) -> Server:
    """A host on the Redis at *url*, not started yet, with a folder of its own in *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    server = host_on(folder, plugins)
    server.command += ["--backend", url, "--workers", str(workers)]
    return server


@asynccontextmanager
async def running_redis_desk(
    name: str, plugins: Mapping[str, str], *, hosts: int = 1, workers: int = 1, partitions: int = 256
) -> AsyncIterator[RedisDesk]:
    """A Redis that keeps what it says (`appendfsync always`) and hosts on it, ready, with the partitions shared out."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(work_folder(name))
        redis = await stack.enter_async_context(RedisServer(folder=folder))
        url = f"{redis.url}?partitions={partitions}"
        servers = [redis_host_on(folder / f"host-{number}", plugins, url, workers=workers) for number in range(hosts)]
        for server in servers:
            stack.push_async_callback(server.stop)
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.start())
        await shared_out(redis, partitions=partitions, owners=hosts * workers)
        yield RedisDesk(redis, servers)


async def shared_out(redis: RedisServer, *, partitions: int, owners: int, prefix: str = "hotdesk") -> None:
    """Wait until all partitions have their owners, so many in all, and stay with them."""
    loop = asyncio.get_running_loop()
    last: list[str | None] = []
    since = loop.time()
    asked = [("HGET", f"{prefix}{{{number}}}:own", "owner") for number in range(partitions)]
    async with asyncio.timeout(SETTLE_S), await redis.open() as connection:
        while True:
            found = await connection.pipeline(asked)
            if found != last or not all(found) or len(set(found)) != min(owners, partitions):
                last, since = found, loop.time()
            elif loop.time() - since > STILL_S:
                return
            await asyncio.sleep(0.05)
