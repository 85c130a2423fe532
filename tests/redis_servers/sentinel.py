"""Redis under Sentinel: a master, replicas, and three that watch and fail over."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from .ports import free_port
from .process import TRIES, PortTaken, ServerProcess, start_all, wait_for
from .resp import Connection, ReplyError
from .server import REPLICATION, Directive, Fsync, RedisServer

__all__ = ["Sentinel", "SentinelSet"]

NAME = "mymaster"
SENTINELS = 3
QUORUM = 2
WAIT_S = 30.0
ANSWER_S = 0.5
"""One that is frozen is asked no longer than this; another one is."""

PACE = ("info-period", 200, "ask-period", 100, "publish-period", 500, "ping-period", 250, "tilt-period", 1000)
"""How often sentinels look, in ms. As shipped a failover takes seconds of waiting for the next look, and a pause of the
machine makes a sentinel do nothing for 30 s (tilt). Bounds that were found by crossing them, since one is always a
multiple of another: a replica that was not heard of for five ping-periods is no candidate, and is asked only once a
second while its master is down; a server that was promoted is made a replica again after four publish-periods by those
who have not heard of it, which takes a second; and who is pinged no more often than `down-after` is thought dead."""

SOONEST_MS = 500
"""For `down-after`: a ping-period, and a look each 100 ms with as much to spare."""


class Sentinel(ServerProcess):
    """One sentinel. It is told of the others in its settings, as it would note them itself after some seconds."""

    def __init__(self, *, address: str, port: int, folder: Path | None) -> None:
        super().__init__(address=address, folder=folder, pick_port=lambda: port)
        self.id = secrets.token_hex(20)
        self.watches: list[str] = []
        """Its own directives, to be given before it is started."""

    def settings(self) -> Iterator[str]:
        yield f"bind {self.address}"
        yield f"port {self.port}"
        yield f"dir {self.folder}"
        yield "protected-mode no"
        yield f"sentinel myid {self.id}"
        yield from self.watches

    def arguments(self) -> Sequence[str]:
        return ("--sentinel",)

    async def open(self) -> Connection:
        return await Connection.open(self.address, self.port)

    async def start(self) -> None:
        await super().start()
        await self.command("SENTINEL", "DEBUG", *PACE)

    async def master_port(self) -> int:
        """The port of the server that this one holds for the master."""
        return int((await self.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME, timeout_s=ANSWER_S))[1])


class SentinelSet:
    """A master, two replicas and three sentinels; a dead master is replaced within 2 s or so.

    `servers[0]` is the master at the start. Servers and sentinels may be killed, frozen and started again one by one.
    """

    def __init__(
        self,
        *,
        replicas: int = 2,
        down_after_ms: int = 500,
        failover_timeout_ms: int = 2000,
        appendfsync: Fsync = "always",
        address: str = "127.0.0.1",
        folder: Path | None = None,
        **directives: Directive,
    ) -> None:
        """*directives* go to the servers, not to the sentinels. *down_after_ms* is 500 at least."""
        if down_after_ms < SOONEST_MS:
            raise ValueError(
                f"down_after_ms={down_after_ms}: sentinels would take the living for dead; {SOONEST_MS} works"
            )
        self.servers: list[RedisServer] = []
        self.sentinels: list[Sentinel] = []
        self._address = address
        self._folder = folder
        self._replicas = replicas
        self._limits = {"down-after-milliseconds": down_after_ms, "failover-timeout": failover_timeout_ms}
        self._appendfsync: Fsync = appendfsync
        self._directives = directives

    @property
    def url(self) -> str:
        """`redis+sentinel://HOST:PORT,HOST:PORT,HOST:PORT/mymaster/0`, of all sentinels."""
        return f"redis+sentinel://{','.join(f'{one.address}:{one.port}' for one in self.sentinels)}/{NAME}/0"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.remove()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.remove()

    async def aclose(self) -> None:
        """Kill all processes and remove their folders; a second call is fine."""
        self.remove()

    def remove(self) -> None:
        """The same without a loop."""
        for process in (*self.sentinels, *self.servers):
            process.remove()

    async def start(self) -> None:
        """Start everything, and wait until it is ready. Raises `StartFailed` and `TimeoutError`."""
        for left in reversed(range(TRIES)):
            self.remove()
            ports = [free_port(self._address) for _ in range(1 + self._replicas + SENTINELS)]
            self._lay_out(ports[: 1 + self._replicas], ports[1 + self._replicas :])
            try:
                await start_all(self.servers)
                await start_all(self.sentinels)
                break
            except PortTaken:
                if not left:
                    raise
        await self.wait_ready()

    async def wait_ready(self, timeout_s: float = WAIT_S) -> None:
        """Wait until all that run agree on the master, its replicas follow it, and it could be failed over."""
        await wait_for(self._missing, "the Sentinel set is ready", timeout_s=timeout_s)

    async def master(self) -> RedisServer:
        """The master, as the first sentinel that answers has it. While it fails over they may not agree."""
        for sentinel in self.sentinels:
            with contextlib.suppress(OSError, EOFError):  # a TimeoutError is an OSError
                return self._server(await sentinel.master_port())
        raise ConnectionError("no sentinel answers")

    async def failover(self, *, kill: bool = True, timeout_s: float = WAIT_S) -> RedisServer:
        """Let another server become the master, and return it once all sentinels that run say so.

        The old one is killed and stays so until it is started, when it becomes a replica; *kill* False leaves it alive
        and orders the failover.
        """
        old = await self.master()
        if kill:
            await old.kill()
        else:
            await wait_for(self._order_failover, "a failover can be ordered", timeout_s=timeout_s)

        async def missing() -> str | None:
            ports = set(await asyncio.gather(*(one.master_port() for one in self.sentinels if one.running)))
            if len(ports) > 1 or old.port in ports:
                return f"the sentinels have {sorted(ports)} for the master; it was {old.port}"
            role = await self._server(*ports).command("ROLE", timeout_s=ANSWER_S)
            return None if role[0] == "master" else f"{ports} is a {role[0]} yet"

        await wait_for(missing, f"another server than {old} is the master", timeout_s=timeout_s)
        return await self.master()

    def _lay_out(self, servers: list[int], sentinels: list[int]) -> None:
        """Make the processes, with their ports; none is started."""
        self.servers = []
        for port in servers:
            follows = {"replicaof": f"{self._address} {servers[0]}"} if self.servers else {}
            directives: dict[str, Any] = {**REPLICATION, **follows, **self._directives}
            server = RedisServer(
                appendfsync=self._appendfsync,
                address=self._address,
                folder=self._folder,
                pick_port=functools.partial(int, port),
                **directives,
            )
            self.servers.append(server)
        self.sentinels = [Sentinel(address=self._address, port=port, folder=self._folder) for port in sentinels]
        known = [
            (sentinel.id, f"sentinel known-sentinel {NAME} {self._address} {port} {sentinel.id}")
            for sentinel, port in zip(self.sentinels, sentinels, strict=True)
        ]
        for sentinel in self.sentinels:
            sentinel.watches = [
                f"sentinel monitor {NAME} {self._address} {servers[0]} {QUORUM}",
                *(f"sentinel {name} {NAME} {value}" for name, value in self._limits.items()),
                f"sentinel parallel-syncs {NAME} {self._replicas}",
                *(f"sentinel known-replica {NAME} {self._address} {port}" for port in servers[1:]),
                *(line for other_id, line in known if other_id != sentinel.id),
            ]

    async def _order_failover(self) -> None:
        sentinel = next(one for one in self.sentinels if one.running)
        await sentinel.command("SENTINEL", "FAILOVER", NAME)  # an error while another one is under way

    def _server(self, port: int) -> RedisServer:
        return next(server for server in self.servers if server.port == port)

    async def _missing(self) -> str | None:
        master = await self.master()
        replicas = {server.port: server for server in self.servers if server.running and server is not master}
        for port, replica in replicas.items():
            role = await replica.command("ROLE", timeout_s=ANSWER_S)
            if role[0] != "slave" or role[2] != master.port or role[3] != "connected":
                return f"{port} does not follow {master.port}: {role}"
        for sentinel in self.sentinels:
            if sentinel.running and (problem := await self._missing_in(sentinel, master, set(replicas))):
                return f"{sentinel}: {problem}"
        return None

    async def _missing_in(self, sentinel: Sentinel, master: RedisServer, replicas: set[int]) -> str | None:
        """What is not as it should be in the eyes of one sentinel."""
        async with await sentinel.open() as connection:
            port = int((await connection.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME))[1])
            if port != master.port:
                return f"has {port} for the master and not {master.port}"
            known = [_fields(one) for one in await connection.command("SENTINEL", "REPLICAS", NAME)]
            good = {int(one["port"]) for one in known if one["flags"] == "slave" and one["master-link-status"] == "ok"}
            if not replicas <= good:
                return f"knows the replicas {sorted(good)} of {sorted(replicas)}: {known}"
            try:
                await connection.command("SENTINEL", "CKQUORUM", NAME)
            except ReplyError as exc:
                return str(exc)
        return None


def _fields(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
