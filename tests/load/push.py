"""Four hosts on one Redis under 500 messages a second together: from a push to the first answer of the new code on
every host, and whether any push lost, doubled, reordered or mixed anything."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import msgspec
from tests.load.checker import judge
from tests.load.client import ConnectionLost, Load, open_loop, percentile
from tests.load.desk import Desk, Entry, message_body, message_request, message_target, note_taken, read_taken
from tests.load.history import Accepted, History, Sent, Streamed
from tests.load.hosts import ADMIN_TOKEN, OUT, Server, work_folder
from tests.load.report import Figure, judged, run_main
from tests.load.sources import marked
from tests.load.streams import read_events
from tests.redis_servers import free_port
from tests.redis_servers.server import RedisServer

from hotdesk.backend import open_shelf
from hotdesk.runtime.shelf import Shelf, pack, publish

HOSTS = 4
RATE = 500
CONVERSATIONS = 250
LIMIT_S = 5.0
"""A host that shows nothing of a push for so long is counted as one that did not take it."""


def source(version: int) -> bytes:
    """The marked bot, which says in which process it runs too."""
    text = marked(version).replace('{"marks": [VERSION]}', '{"marks": [VERSION], "process": os.getpid()}')
    return text.replace("import asyncio\n", "import asyncio\nimport os\n", 1).encode()


@dataclass(slots=True)
class Chunks:
    """What came of one streamed reply, of which the news of a chunk may be lost between two hosts."""

    text: str = ""
    expected: int = 0
    holes: int = 0
    restarts: int = 0
    ended: bool = False

    def add(self, index: int, text: str) -> None:
        if index < self.expected:  # another host has begun it anew
            self.text, self.expected, self.holes, self.restarts = "", 0, 0, self.restarts + 1
        self.holes += index - self.expected
        self.expected = index + 1
        self.text += text

    def streamed(self, conversation: str, id: str) -> Streamed:
        return Streamed(
            conversation=conversation, id=id, time=perf_counter(), text=self.text, ended=self.ended,
            restarts=self.restarts, holes=self.holes,
        )  # fmt: skip


@dataclass(slots=True)
class Traffic:
    """What is said to all hosts, and when each of them first answered by a version."""

    servers: list[Server]
    history: History = field(default_factory=History)
    first: dict[tuple[str, int], float] = field(default_factory=dict)
    """By mark and process."""

    seen: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    def send(self, door: int, n: int) -> bytes:
        conversation, id = f"c{random.randrange(CONVERSATIONS)}", f"m{door}-{n}"
        self.history.add(Sent(conversation=conversation, id=id, time=perf_counter()))
        return message_request(conversation, id, f"message {n}")

    def take(self, status: int, body: bytes) -> bool:
        now = perf_counter()
        if status not in (200, 202):
            return False
        taken = read_taken(body)
        note_taken(self.history, taken, now)
        for reply in taken.replies:
            self._note(reply, now)
        return status == 200

    def _note(self, reply: Entry, now: float) -> None:
        for mark in reply.marks:
            if (mark, reply.by) not in self.first:
                self.first[mark, reply.by] = now
                self.seen.set()

    async def wait_everywhere(self, mark: str) -> bool:
        """Wait until every host has answered by *mark*; False when one has not in time."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while any((mark, server.pid) not in self.first for server in self.servers):
                    self.seen.clear()
                    await self.seen.wait()
        except TimeoutError:
            return False
        return True

    async def stream(self, door: int) -> None:
        """One streamed turn after the other, by a door whose host may not be the one that runs it."""
        conversation, n = f"stream-{door}", 0
        while not self.over:
            n += 1
            id = f"{conversation}-{n}"
            self.history.add(Sent(conversation=conversation, id=id, time=perf_counter()))
            chunks = Chunks()
            target = message_target(conversation, wait=False)
            try:
                async for event, data in read_events(self.servers[door].port, target, message_body(id, "slowly")):
                    said = msgspec.json.decode(data)
                    if event == "accepted":
                        now = perf_counter()
                        self.history.add(Accepted(conversation=conversation, id=id, time=now, seq=said["seq"]))
                    elif event == "chunk":
                        chunks.add(said["index"], said["text"])
                    chunks.ended = event == "done"
            except ConnectionLost:
                pass  # which the judge is told
            self.history.add(chunks.streamed(conversation, id))

    async def run(self, door: int, seconds: float) -> Load:
        return await open_loop(
            self.servers[door].port,
            lambda n: self.send(door, n),
            lambda n, status, body: self.take(status, body),
            rate=RATE / len(self.servers),
            seconds=seconds,
            connections=32,
        )


def host_at(url: str, folder: Path) -> Server:
    """A host that has no plugins of its own."""
    (folder / "plugins").mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "hotdesk", "run", "--port", str(port), "--backend", url]
    command += ["--plugins", str(folder / "plugins"), "--data", str(folder / "data")]
    return Server(command, port=port, folder=folder, env={"HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN})


@asynccontextmanager
async def running_hosts() -> AsyncIterator[tuple[list[Server], Shelf]]:
    """Four hosts that serve what was pushed before they began, and the shelf that they follow."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(work_folder("push"))
        redis = await stack.enter_async_context(RedisServer(appendfsync="everysec"))
        servers = [host_at(redis.url, folder / f"host{number}") for number in range(HOSTS)]
        shelf = await open_shelf(redis.url)
        stack.push_async_callback(shelf.aclose)
        await push(shelf, 0)
        for server in servers:
            stack.push_async_callback(server.stop)
        await asyncio.gather(*(server.start() for server in servers))
        yield servers, shelf


async def push(shelf: Shelf, version: int) -> float:
    """Push a version, and return when that was begun."""
    began = perf_counter()
    data = pack("marked", {"__init__.py": source(version)})
    await publish(shelf, "marked", data, files=1, version=str(version), by="a load run")
    return began


async def measure(short: bool) -> list[Figure]:
    """Traffic through all four doors, pushes, and a stream beside them; then the history is judged."""
    seconds, pushes = (6.0, 8) if short else (120.0, 200)
    each: list[float] = []
    last: list[float] = []
    unseen = 0
    async with running_hosts() as (servers, shelf):
        traffic = Traffic(servers)

        async def keep_pushing() -> None:
            nonlocal unseen
            began = perf_counter()
            for version in range(1, pushes + 1):
                due = began + (seconds - 1.0) * (version - random.random() / 2) / pushes
                await asyncio.sleep(max(0.0, due - perf_counter()))
                mark, pushed = f"v{version}", await push(shelf, version)
                if await traffic.wait_everywhere(mark):
                    waits = [traffic.first[mark, server.pid] - pushed for server in servers]
                    each.extend(waits)
                    last.append(max(waits))
                else:
                    unseen += 1

        async with asyncio.TaskGroup() as group:
            for door in range(HOSTS):
                group.create_task(traffic.stream(door))
            group.create_task(keep_pushing())
            loads = await asyncio.gather(*(traffic.run(door, seconds) for door in range(HOSTS)))
            traffic.over = True
        desk = Desk(servers[0])
        for conversation in {event.conversation: None for event in traffic.history.events}:
            for entry in await desk.read_record(conversation, perf_counter()):
                traffic.history.add(entry)
        desk.close()
    traffic.history.save(OUT / "push.jsonl")
    verdict = judge(traffic.history.events)
    streamed = [event for event in traffic.history.events if isinstance(event, Streamed)]
    return [
        Figure("pushes that every host served", len(last), at_least=pushes - unseen),
        Figure("pushes that a host did not serve", unseen, at_most=0),
        Figure("push to first answer of a host, p50", percentile(each, 50) * 1000, "ms"),
        Figure("push to first answer of the last host, p50", percentile(last, 50) * 1000, "ms"),
        Figure("push to first answer of the last host, p99", percentile(last, 99) * 1000, "ms"),
        Figure("push to first answer of the last host, max", percentile(last, 100) * 1000, "ms", at_most=500),
        Figure("turns", verdict.replies, at_least=None if short else 50_000),
        Figure("streams across pushes", verdict.streams),
        Figure("streams of which a chunk went missing", sum(event.holes > 0 for event in streamed)),
        Figure(f"turn p99 at {RATE}/s", max(load.percentile_ms(99) for load in loads), "ms"),
        Figure("failed", sum(load.failed for load in loads), at_most=0),
        Figure("not accepted", verdict.unaccepted, at_most=0),
        *judged(verdict),
    ]


if __name__ == "__main__":
    run_main(measure)
