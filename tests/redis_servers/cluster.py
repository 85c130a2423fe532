"""A Redis Cluster of three masters, with or without a replica each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from .ports import free_port
from .process import TRIES, PortTaken, start_all, wait_for
from .resp import Connection
from .server import REPLICATION, Directive, Fsync, RedisServer

__all__ = ["Cluster"]

MASTERS = 3
SLOTS = 16384
MANY_KEYS = 500
"""Keys of a slot that travel in one MIGRATE."""

MIGRATE_MS = 5000
WAIT_S = 30.0
ANSWER_S = 1.0

Span = tuple[int, int, tuple[int, ...]]
"""First slot, last slot, and the ports of the node that owns them and of its replicas."""


class Cluster:
    """Three masters that share the slots evenly. It takes 2 s to start: new masters keep still for so long by design.

    `nodes` has the three masters of the start first, then their replicas in the same order. Nodes may be killed, frozen
    and started again one by one.
    """

    def __init__(
        self,
        *,
        replicas: int = 0,
        node_timeout_ms: int = 1000,
        appendfsync: Fsync = "always",
        address: str = "127.0.0.1",
        folder: Path | None = None,
        **directives: Directive,
    ) -> None:
        """*replicas* is 0 or 1, of each master."""
        self.nodes: list[RedisServer] = []
        self._replicas = replicas
        self._address = address
        self._folder = folder
        self._appendfsync: Fsync = appendfsync
        self._directives: dict[str, Any] = {
            "cluster_enabled": True,
            "cluster_config_file": "nodes.conf",
            "cluster_node_timeout": node_timeout_ms,
            "cluster_announce_ip": address,
            **REPLICATION,
            **directives,
        }

    @property
    def url(self) -> str:
        """`redis+cluster://HOST:PORT`, of the first node that runs."""
        node = next((node for node in self.nodes if node.running), self.nodes[0])
        return f"redis+cluster://{node.address}:{node.port}"

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
        """Kill all nodes and remove their folders; a second call is fine."""
        self.remove()

    def remove(self) -> None:
        """The same without a loop."""
        for node in self.nodes:
            node.remove()

    async def start(self) -> None:
        """Start the nodes, join them, and wait until all is ready. Raises `StartFailed` and `TimeoutError`."""
        for left in reversed(range(TRIES)):
            self.remove()
            # The bus has a port beside that for clients; by default it is 10,000 above it, and may be taken.
            buses = [free_port(self._address) for _ in range(MASTERS * (1 + self._replicas))]
            self.nodes = [
                RedisServer(
                    appendfsync=self._appendfsync,
                    address=self._address,
                    folder=self._folder,
                    cluster_port=bus,
                    **self._directives,
                )
                for bus in buses
            ]
            try:
                await start_all(self.nodes)
                break
            except PortTaken:
                if not left:
                    raise
        await self._join(buses)
        await self.wait_ready()

    async def wait_ready(self, timeout_s: float = WAIT_S) -> None:
        """Wait until all nodes that run say `ok`, have the same picture of who owns what, and the replicas follow."""
        await wait_for(self._missing, "the cluster is ready", timeout_s=timeout_s)

    async def owner(self, key: str) -> RedisServer:
        """The node that has the slot of *key*, as the first node that runs has it."""
        node = next(node for node in self.nodes if node.running)
        slot = int(await node.command("CLUSTER", "KEYSLOT", key))
        for first, last, ports in await _spans(node):
            if first <= slot <= last:
                return self._node(ports[0])
        raise LookupError(f"nobody owns slot {slot}")

    async def failover(self, master: RedisServer, *, kill: bool = True, timeout_s: float = WAIT_S) -> RedisServer:
        """Let the replica of *master* take its slots, and return it once every node that runs says so.

        The old one is killed and stays so until it is started, when it becomes a replica; *kill* False leaves it alive
        and orders the failover.
        """
        spans = [ports for _, _, ports in await _spans(master) if ports[0] == master.port]
        replica = self._node(spans[0][1])
        if kill:
            await master.kill()
        else:
            await replica.command("CLUSTER", "FAILOVER")

        async def missing() -> str | None:
            for node in self.nodes:
                if node.running and (owners := {ports[0] for _, _, ports in await _spans(node)}) >= {master.port}:
                    return f"{node} has {sorted(owners)} for the owners"
            return await self._missing()

        await wait_for(missing, f"{replica} has the slots of {master}", timeout_s=timeout_s)
        return replica

    async def move_slots(
        self,
        slots: Iterable[int],
        source: RedisServer,
        target: RedisServer,
        *,
        halfway: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """Move slots with their keys from one master to another, one after the other, while they are being used.

        *halfway* is awaited for each slot when half of its keys have moved: then clients are sent to and fro by `ASK`,
        and a script with keys on both sides hears `TRYAGAIN`. Raises `ReplyError` with the server's reason.
        """
        others = [node for node in self.nodes if node.running and node not in (source, target)]
        source_id, target_id = await source.command("CLUSTER", "MYID"), await target.command("CLUSTER", "MYID")
        masters = [node for node in others if (await node.command("ROLE"))[0] == "master"]
        async with await source.open() as here, await target.open() as there:
            for slot in slots:
                await there.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
                await here.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
                count = int(await here.command("CLUSTER", "COUNTKEYSINSLOT", slot))
                if halfway is not None:
                    await _migrate(here, target, slot, count // 2)
                    await halfway(slot)
                while await _migrate(here, target, slot, MANY_KEYS):
                    pass
                # To the new owner first: were it lost in between, the old one would still send clients there.
                await there.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
                await here.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
                for node in masters:
                    await node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    async def _join(self, buses: list[int]) -> None:
        """Give the masters their slots, let every node meet every other, and make replicas of the rest."""
        for number, node in enumerate(self.nodes):
            # Epochs of their own from the start: else the nodes find out one by one that they have the same.
            await node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < MASTERS:
                ends = (SLOTS * number // MASTERS, SLOTS * (number + 1) // MASTERS - 1)
                await node.command("CLUSTER", "ADDSLOTSRANGE", *ends)
        for (node, _), (other, bus) in combinations(zip(self.nodes, buses, strict=True), 2):
            await node.command("CLUSTER", "MEET", other.address, other.port, bus)
        for number, replica in enumerate(self.nodes[MASTERS:]):
            master_id = await self.nodes[number].command("CLUSTER", "MYID")

            async def knows(replica: RedisServer = replica, master_id: str = master_id) -> None:
                await replica.command("CLUSTER", "REPLICATE", master_id)  # an error until it has met its master

            await wait_for(knows, f"{replica} knows its master", timeout_s=WAIT_S)

    async def _missing(self) -> str | None:
        running = [node for node in self.nodes if node.running]
        pictures = await asyncio.gather(*map(_spans, running))
        for node, picture in zip(running, pictures, strict=True):
            state = await node.command("CLUSTER", "INFO", timeout_s=ANSWER_S)
            if "cluster_state:ok" not in state or sum(last - first + 1 for first, last, _ in picture) < SLOTS:
                return f"{node} says {' '.join(state.split())}"
            if picture != pictures[0]:
                return f"{node} and {running[0]} do not agree: {picture}, {pictures[0]}"
            role = await node.command("ROLE", timeout_s=ANSWER_S)
            if role[0] == "slave" and (role[3] != "connected" or not any(node.port in s[2][1:] for s in picture)):
                return f"{node} follows nobody yet: {role}, {picture}"
        return None

    def _node(self, port: int) -> RedisServer:
        return next(node for node in self.nodes if node.port == port)


async def _spans(node: RedisServer) -> list[Span]:
    """Who owns what, as *node* has it; the replicas of an owner in one order everywhere."""
    slots = await node.command("CLUSTER", "SLOTS", timeout_s=ANSWER_S)
    return sorted((first, last, (owner[1], *sorted(r[1] for r in rest))) for first, last, owner, *rest in slots)


async def _migrate(source: Connection, target: RedisServer, slot: int, count: int) -> int:
    """Send up to *count* keys of a slot to *target*; how many there were to send."""
    keys = await source.command("CLUSTER", "GETKEYSINSLOT", slot, count) if count else []
    if keys:
        await source.command("MIGRATE", target.address, target.port, "", 0, MIGRATE_MS, "KEYS", *keys)
    return len(keys)
