"""5,000 visitors with WebSockets on one of two workers, which is killed: all come back, each to just what it missed.

The desk has one port, and the kernel spreads who connects, so twice as many visitors are seated. Whoever loses the
connection comes again as a page would, after up to a second, then up to two, with `after=`. Meanwhile somebody speaks
in a fifth of the conversations, over whatever worker is there. With --apart there are two hosts with a port each; all
visitors are on the one that is killed, and come back to the other.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from time import perf_counter

import msgspec
import psutil
from tests.load.client import ConnectionLost, HttpClient, percentile
from tests.load.desk import Desk, message_body, message_target
from tests.load.hosts import Server
from tests.load.idle_visitors import AT_ONCE, SOURCES, allow_descriptors
from tests.load.redis_desk import running_redis_desk
from tests.load.report import Figure, run_main
from tests.load.sockets import WebSocket, open_socket
from tests.load.sources import onion

__all__ = ["measure"]

SPOKEN_IN = 5
"""Somebody speaks in each so-manieth conversation: once before the kill, twice after it."""

SPEAKERS = 48
JITTER_S = 1.0
MOST_WAIT_S = 4.0
CONNECT_S = 5.0
BACK_S = 10.0
FAULTS = ("lost", "doubled", "reordered", "never said", "not back")
GIVE_UP_S = 60.0
LOOK_S = 0.01
TEXT = "a refund, please"


class Frame(msgspec.Struct, frozen=True):
    """The part of a frame that this run looks at. `at` is when the reply came to be, Unix seconds."""

    type: str
    seq: int = 0
    at: float = 0.0


_read_frame = msgspec.json.Decoder(Frame).decode


class Visitor:
    """One page: its conversation, and what it was shown."""

    def __init__(self, number: int) -> None:
        self.conversation = f"v{number}"
        self.heard: list[int] = []
        self.at: dict[int, float] = {}
        """When each reply came to be, and ..."""

        self.heard_at: dict[int, float] = {}
        """... when it was shown, both in Unix seconds."""

        self.tries = 0
        self.back_at = 0.0
        self._source = SOURCES[number % len(SOURCES)]
        self._socket: WebSocket | None = None
        self.returning: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Its connection is gone, and it has not set out to get another."""
        return self.returning is None and self._socket is not None and self._socket.closed is not None

    async def come(self, port: int) -> None:
        """Connect, with `after=`. Raises `OSError` and `ConnectionLost`."""
        target = f"/v1/ws?conversation={self.conversation}&after={max(self.heard, default=0)}"
        self._socket = await open_socket(port, target, self._take, source=self._source)

    async def come_back(self, ports: Sequence[int]) -> None:
        """What a page does that lost its connection."""
        while True:
            await asyncio.sleep(random.uniform(0, min(JITTER_S * 2**self.tries, MOST_WAIT_S)))
            self.tries += 1
            try:
                async with asyncio.timeout(CONNECT_S):
                    await self.come(random.choice(ports))
            except (OSError, TimeoutError, ConnectionLost):
                continue
            self.back_at = time.time()
            self.returning = None
            return

    def missed(self, killed: float) -> int:
        """How many replies came to be while it was away."""
        return sum(killed < at < self.back_at for at in self.at.values())

    def whole_at(self, killed: float) -> float:
        """When it was back and had what it had missed; never, where it is not back."""
        shown = [self.heard_at[seq] for seq, at in self.at.items() if killed < at < self.back_at]
        return max(self.back_at, *shown, 0.0) if self.back_at else math.inf

    def faults(self, replies: list[int]) -> Counter[str]:
        """How what it was shown differs from *replies*."""
        heard = set(self.heard)
        return Counter(
            {
                "lost": len(set(replies) - heard),
                "doubled": len(self.heard) - len(heard),
                "reordered": int(self.heard != sorted(self.heard)),
                "never said": len(heard - set(replies)),
                "not back": int(self.lost or self.returning is not None),
            }
        )

    def leave(self) -> None:
        if self._socket is not None:
            self._socket.transport.abort()

    def _take(self, socket: WebSocket, text: bytes) -> None:
        frame = _read_frame(text)
        if frame.type == "reply":
            self.heard.append(frame.seq)
            self.at[frame.seq] = frame.at
            self.heard_at.setdefault(frame.seq, time.time())


async def measure(short: bool, *, apart: bool = False) -> list[Figure]:
    """Seat everybody, speak, kill, go on speaking, wait until all are back; then compare with the record."""
    on_one = 300 if short else 5_000
    visitors = [Visitor(number) for number in range(on_one if apart else 2 * on_one)]
    allow_descriptors(len(visitors) + 1_000)
    layout = {"hosts": 2} if apart else {"workers": 2}
    async with running_redis_desk("redis-reconnect", onion(1), **layout) as desk, AsyncExitStack() as stack:
        for visitor in visitors:
            stack.callback(visitor.leave)
        first, last = desk.hosts[0], desk.hosts[-1]
        for start in range(0, len(visitors), AT_ONCE):
            await asyncio.gather(*(visitor.come(first.port) for visitor in visitors[start : start + AT_ONCE]))
        spoken = visitors[::SPOKEN_IN]
        await speak(last, spoken, "before")
        await until(lambda: all(visitor.heard for visitor in spoken))
        killed = time.time()
        os.kill(first.pid if apart else psutil.Process(first.pid).children()[-1].pid, signal.SIGKILL)
        speaking = asyncio.create_task(speak(last, spoken, "after", "later"))
        returned = await see_back(visitors, [last.port], speaking)
        await speaking
        record = await read_replies(last, spoken)
        await until(lambda: all(len(visitor.heard) >= len(record[visitor.conversation]) for visitor in spoken))
        return figures_of(visitors, returned, record, killed)


async def see_back(visitors: list[Visitor], ports: list[int], speaking: asyncio.Task[None]) -> list[Visitor]:
    """Have everybody who loses the connection come again, until all are there and nobody speaks; who that was."""
    returned: dict[Visitor, None] = {}
    until = perf_counter() + GIVE_UP_S
    while perf_counter() < until:
        for visitor in visitors:
            if visitor.lost:
                returned[visitor] = None
                visitor.returning = asyncio.create_task(visitor.come_back(ports))
        await asyncio.sleep(LOOK_S)
        if returned and speaking.done() and not any(visitor.returning or visitor.lost for visitor in returned):
            break
    for visitor in returned:
        if visitor.returning is not None:
            visitor.returning.cancel()
    return list(returned)


async def speak(host: Server, spoken: list[Visitor], *words: str) -> None:
    """Say each of *words* in all of these conversations, in no order; again, with the same id, until it is answered."""
    for word in words:
        waiting = random.sample(spoken, len(spoken))

        async def say(waiting: list[Visitor] = waiting, word: str = word) -> None:
            client = HttpClient(host.port)
            while waiting:
                visitor = waiting.pop()
                if not await is_taken(client, visitor.conversation, word):
                    waiting.insert(0, visitor)
                    await asyncio.sleep(0.1)
            client.close()

        await asyncio.gather(*(say() for _ in range(SPEAKERS)))


async def is_taken(client: HttpClient, conversation: str, id: str) -> bool:
    """Say it once; whether the turn ended."""
    target = message_target(conversation, wait=True)
    try:
        return (await client.request("POST", target, message_body(id, TEXT), timeout=CONNECT_S)).status == 200
    except ConnectionLost:
        return False


async def read_replies(host: Server, spoken: list[Visitor]) -> dict[str, list[int]]:
    """The replies of each conversation, by their seq, as the record has them."""
    desk = Desk(host)
    record = {}
    for visitor in spoken:
        entries = await desk.read_entries(visitor.conversation)
        record[visitor.conversation] = [entry.seq for entry in entries if entry.type == "reply"]
    desk.close()
    return record


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until *condition* holds, or the time is up; what is missing then is found when all is compared."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        if condition():
            return
        await asyncio.sleep(LOOK_S)


def figures_of(
    visitors: list[Visitor], returned: list[Visitor], record: dict[str, list[int]], killed: float
) -> list[Figure]:
    """How long it took everybody, and how what they were shown differs from the record."""
    back = [visitor.whole_at(killed) - killed for visitor in returned]
    faults: Counter[str] = Counter()
    missed = 0
    for visitor in visitors:
        faults += visitor.faults(record.get(visitor.conversation, []))
        missed += visitor.missed(killed)
    return [
        Figure("visitors", len(visitors)),
        Figure("of whom the killed one had", len(returned)),
        Figure("replies that they missed", missed),
        Figure("back, with what they missed, p50", percentile(back, 50), "s"),
        Figure("the same, the last", percentile(back, 100), "s", at_most=BACK_S),
        Figure("tries, at most", max((visitor.tries for visitor in returned), default=0)),
        *(Figure(f"{what}", faults[what], at_most=0) for what in FAULTS),
    ]


def own_options() -> argparse.ArgumentParser:
    """What can be said beside --short and --json."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--apart", action="store_true", help="two hosts with a port each in place of two workers")
    return parser


if __name__ == "__main__":
    run_main(measure, own_options())
