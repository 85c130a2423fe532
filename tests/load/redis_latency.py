"""From accepted to taken by a worker, at 1,000 messages a second over two hosts on one Redis.

Every message goes to either host by chance, so half of them are taken by the other one. The bot notes when its turn
begins, on the clock that all processes of a machine share; the visitor, when it was promised. A turn may begin before
its visitor has heard the promise, so the whole way is shown as well, from the moment at which the message left.
"""

from __future__ import annotations

import asyncio
import random
from itertools import count
from time import monotonic

from tests.load.client import Load, open_loop, percentile
from tests.load.desk import Desk, message_request
from tests.load.hosts import Server
from tests.load.redis_desk import running_redis_desk
from tests.load.report import Figure, run_main

__all__ = ["measure"]

RATE = 1_000
CONVERSATIONS = 2_000
CONNECTIONS = 128
TEXT = "Hello, when will I get my refund? The order is number 4711."

BOT = '''\
"""Says when its turn began, and in which process."""

import os
import time

from hotdesk_sdk import Reply, hookimpl


@hookimpl
async def respond(turn):
    return Reply("It takes three days.", metadata={"taken": time.monotonic(), "process": os.getpid()})
'''


class Way:
    """When one message left, was promised by which host, and was taken by which."""

    __slots__ = ("accepted", "accepted_by", "conversation", "left", "taken", "taken_by")

    def __init__(self, conversation: str, host: Server) -> None:
        self.conversation = conversation
        self.accepted_by = host.pid
        self.taken_by = 0
        self.left = self.accepted = self.taken = 0.0


class Traffic:
    """Messages to either host, each written down."""

    def __init__(self, name: str) -> None:
        self.ways: dict[str, Way] = {}
        self._ids = (f"{name}{number}" for number in count())

    async def run(self, host: Server, seconds: float) -> Load:
        """Half of the rate, to *host*."""
        mine: list[str] = []

        def request(n: int) -> bytes:
            id, conversation = next(self._ids), f"c{random.randrange(CONVERSATIONS)}"
            mine.append(id)
            way = self.ways[id] = Way(conversation, host)
            way.left = monotonic()
            return message_request(conversation, id, TEXT, wait=False)

        def accept(n: int, status: int, body: bytes) -> bool:
            self.ways[mine[n]].accepted = monotonic()
            return status == 202

        return await open_loop(host.port, request, accept, rate=RATE / 2, seconds=seconds, connections=CONNECTIONS)

    async def read_back(self, host: Server) -> int:
        """Learn from the record who took what when; how many were accepted and never answered."""
        desk = Desk(host)
        for conversation in {way.conversation for way in self.ways.values()}:
            for entry in await desk.read_entries(conversation):
                if entry.type == "reply" and (way := self.ways.get(entry.to or "")) is not None:
                    way.taken = float(entry.metadata["taken"])
                    way.taken_by = entry.by
        desk.close()
        return sum(bool(way.accepted) and not way.taken for way in self.ways.values())


async def measure(short: bool) -> list[Figure]:
    """Warm up, load both hosts at once, read back when each turn began."""
    seconds = 4.0 if short else 30.0
    async with running_redis_desk("redis-latency", {"bot.py": BOT}, hosts=2) as desk:
        warm_up, traffic = Traffic("warm"), Traffic("m")
        await asyncio.gather(*(warm_up.run(host, 2.0) for host in desk.hosts))
        loads = await asyncio.gather(*(traffic.run(host, seconds) for host in desk.hosts))
        unanswered = await traffic.read_back(desk.hosts[0])
    ways = [way for way in traffic.ways.values() if way.taken]
    here = [way for way in ways if way.taken_by == way.accepted_by]
    elsewhere = [way for way in ways if way.taken_by != way.accepted_by]
    promised = [(way.taken - way.accepted) * 1000 for way in ways]
    return [
        Figure("messages a second", len(ways) / seconds),
        Figure("taken by the other host", len(elsewhere) / len(ways) * 100, "%"),
        Figure("accepted to taken, p50", percentile(promised, 50), "ms", at_most=2),
        Figure("accepted to taken, p99", percentile(promised, 99), "ms", at_most=15),
        *(
            Figure(f"left to taken, {name}, p{percent}", percentile(whole_ms(some), percent), "ms")
            for name, some in (("by the same host", here), ("by the other host", elsewhere))
            for percent in (50, 99)
        ),
        Figure("left to taken, all, p50", percentile(whole_ms(ways), 50), "ms"),
        Figure("left to taken, all, p99", percentile(whole_ms(ways), 99), "ms"),
        Figure("accepted and never answered", unanswered, at_most=0),
        Figure("failed", sum(load.failed for load in loads), at_most=0),
    ]


def whole_ms(ways: list[Way]) -> list[float]:
    """From leaving to the beginning of the turn: the door, the append with its flush, and the way to who runs it."""
    return [(way.taken - way.left) * 1000 for way in ways]


if __name__ == "__main__":
    run_main(measure)
