"""Who owned which conversation when, by looking into Redis again and again."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Iterable
from time import perf_counter

import msgspec
from tests.chaos.topology import Keyed, SharedRedis
from tests.load.history import History, Owned

__all__ = ["Owners", "partition_of"]

PARTITIONS = 256
LOOK_S = 0.25
SETTLE_S = 20.0
MEMBERS = "hotdesk{ctl}:members"


class _About(msgspec.Struct, frozen=True):
    pid: int


_about = msgspec.json.Decoder(_About).decode


class Owners:
    """The owners of all partitions, as they were when somebody looked last; every change goes into the history."""

    def __init__(self, redis: SharedRedis, history: History) -> None:
        self._redis = redis
        self._history = history
        self._found: dict[int, tuple[str, int]] = {}
        self._processes: dict[str, int] = {"": 0}
        self._keys = [f"hotdesk{{{number}}}:own" for number in range(PARTITIONS)]
        self._asked: list[Keyed] = [
            (MEMBERS, ("HGETALL", MEMBERS)),
            *((key, ("HMGET", key, "owner", "epoch")) for key in self._keys),
        ]

    async def look(self) -> bool:
        """Look once; False where Redis can't be asked."""
        try:
            members, *rows = await self._redis.ask(self._asked)
        except (OSError, EOFError):
            return False
        for name, lease in zip(members[::2], members[1::2], strict=True):
            if not name.startswith("@") and name not in self._processes:
                self._processes[name] = _about(lease.partition(" ")[2]).pid
        now = perf_counter()
        for number, (owner, epoch) in enumerate(rows):
            found = owner or "", int(epoch or 0)
            if self._found.get(number) != found:
                self._found[number] = found
                self._history.add(
                    Owned(
                        conversation="",
                        id=found[0],
                        time=now,
                        partition=number,
                        partitions=PARTITIONS,
                        epoch=found[1],
                        by=self._processes.get(found[0], -1),
                    )
                )
        return True

    async def watch(self) -> None:
        """Look again and again, until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def wait_shared_out(self, owners: int) -> None:
        """Wait until every partition has one of *owners* owners, each of whom has some."""
        async with asyncio.timeout(SETTLE_S):
            while True:
                seen = await self.look()
                names = {name for name, _ in self._found.values()}
                if seen and all(names) and len(names) == owners:
                    return
                await asyncio.sleep(LOOK_S / 5)

    def of(self, processes: Iterable[int]) -> frozenset[int]:
        """The partitions that *processes* owned at the last look."""
        those = set(processes)
        return frozenset(
            number for number, (name, _) in self._found.items() if name and self._processes.get(name) in those
        )

    async def refused(self) -> int:
        """How many writes of owners with an old epoch were refused, ever."""
        rows = await self._redis.ask([(key, ("HGET", key, "refused")) for key in self._keys])
        return sum(int(row or 0) for row in rows)

    async def dead_letters(self) -> int:
        """How many messages were given up."""
        names = [f"{key.removesuffix('own')}dead" for key in self._keys]
        return sum(await self._redis.ask([(name, ("HLEN", name)) for name in names]))

    async def id_memory(self) -> tuple[int, int]:
        """How many ids of messages are kept, and how many bytes of memory they take."""
        names = await self._redis.ask([(key, ("KEYS", f"{key.removesuffix('own')}id:*")) for key in self._keys])
        buckets = [name for found in names for name in found]
        counts = await self._redis.ask([(name, ("HLEN", name)) for name in buckets])
        sizes = await self._redis.ask([(name, ("MEMORY", "USAGE", name, "SAMPLES", 0)) for name in buckets])
        return sum(counts), sum(sizes)

    async def wait_quiet(self, timeout_s: float) -> int:
        """Wait until no turn is open anywhere; how many still are."""
        asked: list[Keyed] = [
            (key, ("XLEN", key)) for key in (f"hotdesk{{{number}}}:in" for number in range(PARTITIONS))
        ]
        left = -1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while left:
                    with contextlib.suppress(OSError, EOFError):
                        left = sum(await self._redis.ask(asked))
                    await asyncio.sleep(0.1)
        return left


def partition_of(conversation: str) -> int:
    """The partition of a conversation: the same on every host, for ever."""
    return zlib.crc32(conversation.encode()) % PARTITIONS
