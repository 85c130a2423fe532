"""Hosts on one Redis, each a process with folders of its own, and what can be done to each."""

from __future__ import annotations

import asyncio
import math
import os
import random
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import psutil
from tests.chaos.bot import counting_bot
from tests.chaos.resume import Absence
from tests.chaos.topology import SharedRedis, Topology, open_shared_redis
from tests.load.hosts import ADMIN_TOKEN, OUT, Server, work_folder
from tests.load.swaps import replace_file
from tests.redis_servers import Link, Namespace, can_use_namespaces, free_port
from tests.redis_servers.server import Fsync

__all__ = ["ChaosHost", "Fleet", "open_fleet"]

HOSTS = 4
BOT = "bot.py"
DOOR = 8080
"""Where the host in a namespace listens: all ports there are its own."""


class ChaosHost(Server):
    """One host, on a port of the loopback. `way` is what it reaches Redis by, where that can be cut."""

    def __init__(
        self, number: int, command: list[str], *, port: int, folder: Path, way: Link | Namespace | None
    ) -> None:
        super().__init__(command, port=port, folder=folder, env={"HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN})
        self.number = number
        self.way = way
        self.absences: list[Absence] = []
        """When it was dead, stopped or cut off, also at the moment."""

    @property
    def away(self) -> bool:
        return bool(self.absences) and self.absences[-1].ended == math.inf

    def leaves(self) -> None:
        """It is dead, stopped or cut off from now on."""
        self.absences.append(Absence(self.number, perf_counter(), math.inf))

    def returns(self) -> None:
        self.absences[-1] = replace(self.absences[-1], ended=perf_counter())

    def processes(self) -> set[int]:
        """Its process, and its workers where it has such."""
        assert self._process is not None
        try:
            children = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        return {self._process.pid, *(child.pid for child in children)}

    def signal(self, number: signal.Signals) -> None:
        """To all its processes, the last-born first: no supervisor sees a worker end before its own turn comes."""
        for pid in sorted(self.processes(), reverse=number != signal.SIGSTOP):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    async def kill(self) -> None:
        """SIGKILL to all its processes at once, stopped or not; one that has ended is left so."""
        assert self._process is not None
        if not self.running:
            return
        self.signal(signal.SIGSTOP)
        self.signal(signal.SIGKILL)
        await self._process.wait()

    async def cut(self, how: str) -> None:
        """Cut it off from Redis: `cut` and `stall` a link, or let a namespace's packets vanish."""
        if isinstance(self.way, Namespace):
            await self.way.cut()
        elif isinstance(self.way, Link):
            self.way.stall() if how == "stall" else self.way.cut()

    async def heal(self) -> None:
        if self.way is not None:
            await self.way.heal()


class Fleet:
    """All hosts, and their Redis."""

    def __init__(self, redis: SharedRedis, hosts: list[ChaosHost]) -> None:
        self.redis = redis
        self.hosts = hosts
        self.version = 0

    @property
    def well(self) -> list[ChaosHost]:
        return [host for host in self.hosts if not host.away]

    async def start(self) -> None:
        """Start all hosts side by side."""
        async with asyncio.TaskGroup() as group:
            for host in self.hosts:
                group.create_task(host.start())

    async def swap(self) -> None:
        """The next version of the bot, into every host's folder."""
        self.version += 1
        source = counting_bot(self.version).encode()
        for host in random.sample(self.hosts, len(self.hosts)):
            await asyncio.to_thread(replace_file, host.plugins / BOT, source)

    async def stop(self) -> None:
        """Let all come to their end, also those that are stopped or cut off."""
        for host in self.hosts:
            await host.heal()
            if host.running:
                host.signal(signal.SIGCONT)
        stops = [host.stop() for host in self.hosts]
        for outcome in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def keep_logs(self, name: str) -> None:
        """Put the hosts' logs where the run's history is."""
        for host in self.hosts:
            if host.log.exists():
                shutil.copy(host.log, OUT / f"{name}-{host.number}.log")


@asynccontextmanager
async def open_fleet(
    name: str, *, topology: Topology = "one", fsync: Fsync = "always", workers: int = 1, hosts: int = HOSTS
) -> AsyncIterator[Fleet]:
    """Start Redis and *hosts* hosts on it; at the end nothing of them is left but their logs.

    The first host reaches Redis directly, the last is in a network namespace where there may be such, and those between
    go through links where a link may be put.
    """
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(work_folder(name))
        namespace = None
        if can_use_namespaces() is None:
            namespace = await stack.enter_async_context(Namespace())
        address = "127.0.0.1" if namespace is None else namespace.gateway
        redis = await stack.enter_async_context(open_shared_redis(topology, fsync=fsync, address=address))
        made: list[ChaosHost] = []
        for number in range(hosts):
            inside = namespace if number == hosts - 1 else None
            made.append(await _make_host(stack, number, folder, redis, inside, workers))
        fleet = Fleet(redis, made)
        try:
            await fleet.start()
            yield fleet
            await fleet.stop()
        finally:
            for host in made:
                if host.running:
                    await host.kill()
            fleet.keep_logs(name)


async def _make_host(
    stack: AsyncExitStack, number: int, folder: Path, redis: SharedRedis, inside: Namespace | None, workers: int
) -> ChaosHost:
    home = folder / f"host-{number}"
    (home / "plugins").mkdir(parents=True)
    (home / "plugins" / BOT).write_text(counting_bot(0))
    command = [sys.executable, "-m", "hotdesk", "run", "--log-format", "json", "--workers", str(workers)]
    command += ["--plugins", str(home / "plugins"), "--data", str(home / "data")]
    if inside is not None:
        door = await stack.enter_async_context(await Link.open(DOOR, to=inside.address))
        command = inside.command(*command, "--backend", redis.url, "--host", inside.address, "--port", str(DOOR))
        return ChaosHost(number, command, port=door.port, folder=home, way=inside)
    url, way, port = redis.url, None, free_port()
    if number and (server := redis.link_to) is not None:
        way = await stack.enter_async_context(await Link.open(server.port, to=server.address))
        url = server.url_at("127.0.0.1", way.port)
    return ChaosHost(number, [*command, "--backend", url, "--port", str(port)], port=port, folder=home, way=way)
