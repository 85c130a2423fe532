"""How many turns a second one Redis carries: what a worker says to it, recorded once, and said again without one.

The recording is of the real thing, byte for byte: appends and ends of turns in 2,000 conversations of 32 partitions.
It is played to a fresh Redis over 16 connections, as 16 hosts would, each of which sends its next batch when the last
was answered. Beside it, what is kept: memory and file.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import hiredis
from tests.backend.worker import Worker, reply
from tests.load.client import hold_gc
from tests.load.hosts import work_folder
from tests.load.redis_desk import RedisDesk
from tests.load.report import Figure, run_main
from tests.redis_servers import RedisServer
from tests.redis_servers.server import Fsync

from hotdesk.backend.redis_wire import Scripts
from hotdesk.logs import configure_logs

__all__ = ["measure"]

LANES = 16
BATCH = 8
"""Commands that a connection sends together: 128 are under way in all, some 5 ms of them at the rates found here."""

CONVERSATIONS = 2_000
PARTITIONS = 32
"""Few, so that each has thousands of ids, as in service: the first 512 are packed closer."""

PAGE = 500
AT_ONCE = 64
TEXT = "Hello, when will I get my refund? The order is number 4711."
ANSWER = "A refund takes three days from the moment at which we have the parcel."

Command = list[bytes]
"""A command with its arguments."""


class Recorder:
    """A relay before a Redis that remembers every command, in the order in which it came."""

    def __init__(self, redis: RedisServer) -> None:
        self.port = 0
        self.commands: list[Command] = []
        self._redis = redis
        self._relays: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Relay what connects to `port`."""
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._relays:
                task.cancel()
            await asyncio.gather(*self._relays, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._redis.address, self._redis.port)
        back = asyncio.create_task(_copy(far_reader, writer))
        self._relays.add(back)
        commands = hiredis.Reader()
        try:
            while data := await reader.read(2**16):
                commands.feed(data)
                while (command := commands.gets()) is not False:
                    self.commands.append(command)
                far_writer.write(data)
        finally:
            back.cancel()
            writer.close()
            far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)


class Recording:
    """What a worker said, as it is to be said again."""

    def __init__(self, commands: list[Command], turns: int) -> None:
        self.turns = turns
        self.scripts = [command for command in commands if command[:2] == [b"SCRIPT", b"LOAD"]]
        lanes: dict[int, list[Command]] = defaultdict(list)
        for command in commands:
            if command[0] == b"EVALSHA" and (tag := command[3].partition(b"{")[2].partition(b"}")[0]).isdigit():
                lanes[int(tag) % LANES].append(command)  # one partition's stay in their order
        self.lanes = list(lanes.values())


class Lane(asyncio.Protocol):
    """One connection: a batch, its answers, the next batch."""

    def __init__(self, commands: list[Command], wrong: list[object]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._names = [command[1].decode() for command in commands]
        pack: Any = hiredis.pack_command  # its own types say that a command is one word
        packed: list[bytes] = [pack(tuple(command)) for command in commands]
        self._batches = [b"".join(packed[at : at + BATCH]) for at in range(0, len(packed), BATCH)]
        self._answers = hiredis.Reader()
        self._answered = 0
        self._sent = 0
        self._wrong = wrong
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def begin(self) -> None:
        self._send()

    def data_received(self, data: bytes) -> None:
        self._answers.feed(data)
        while (answer := self._answers.gets()) is not False:
            if not is_right(self._names[self._answered], answer):
                self._wrong.append(answer)
            self._answered += 1
        if self._answered == len(self._names):
            self.done.set_result(None)
            self._transport.close()
        elif self._answered == self._sent * BATCH:
            self._send()

    def _send(self) -> None:
        self._transport.write(self._batches[self._sent])
        self._sent += 1


HASHES = Scripts().hashes


def is_right(script: str, answer: object) -> bool:
    """Whether a script did what it did when it was recorded."""
    wanted = {HASHES["append"]: 0, HASHES["finish"]: 1, HASHES["take"]: 1}.get(script)
    return wanted is None or (isinstance(answer, list) and answer[0] == wanted)


async def measure(short: bool) -> list[Figure]:
    """Record, then play to a new Redis again and again, with a flush to the disk a batch and with one a second."""
    turns, rounds = (2_000, 1) if short else (60_000, 3)
    configure_logs("json", "error")
    with work_folder("redis-ceiling") as folder:
        recording, kept = await record(folder, turns)
        found: dict[Fsync, list[Played]] = {"always": [], "everysec": []}
        for _ in range(rounds):
            for fsync, played in found.items():
                played.append(await play(folder, recording, fsync))
    always = found["always"]
    return [
        *(
            Figure(f"appendfsync {fsync}", median(one.rate for one in played), "turns/s")
            for fsync, played in found.items()
        ),
        *(
            Figure(f"appendfsync {fsync}, Redis busy", median(one.busy for one in played), "cores")
            for fsync, played in found.items()
        ),
        Figure("a turn", median(one.cpu_us for one in always), "µs of Redis' CPU"),
        Figure("a turn, with one flush a second", median(one.cpu_us for one in found["everysec"]), "µs of Redis' CPU"),
        Figure("commands a turn, those in scripts too", median(one.commands for one in always)),
        Figure("the generator, a turn", median(one.own_us for one in always), "µs of CPU"),
        *kept,
        Figure("not as recorded", sum(one.wrong for played in found.values() for one in played), at_most=0),
    ]


@dataclass(frozen=True, slots=True)
class Played:
    """What one playing came to."""

    rate: float
    busy: float
    cpu_us: float
    own_us: float
    commands: float
    wrong: int


async def play(folder: Path, recording: Recording, fsync: Fsync) -> Played:
    """Say it all to a new Redis, as fast as that answers."""
    loop = asyncio.get_running_loop()
    wrong: list[object] = []
    async with RedisServer(folder=folder, appendfsync=fsync) as redis:
        async with await redis.open() as connection:
            await connection.pipeline(recording.scripts)
        lanes = [
            (await loop.create_connection(partial(Lane, commands, wrong), redis.address, redis.port))[1]
            for commands in recording.lanes
        ]
        desk = RedisDesk(redis, ())
        before = await desk.spent()
        with hold_gc():
            own, began = time.process_time(), time.perf_counter()
            for lane in lanes:
                lane.begin()
            await asyncio.gather(*(lane.done for lane in lanes))
            took, own = time.perf_counter() - began, time.process_time() - own
        spent = await desk.spent() - before
    return Played(
        rate=recording.turns / took,
        busy=spent.redis_cpu_us / 1e6 / took,
        cpu_us=spent.redis_cpu_us / recording.turns,
        own_us=own / recording.turns * 1e6,
        commands=spent.commands / recording.turns,
        wrong=len(wrong),
    )


async def rewrite(redis: RedisServer) -> dict[str, str]:
    """Have Redis write its file anew, and return what it says of it then."""
    await redis.command("BGREWRITEAOF")
    while True:
        info = await redis.info("persistence")
        if info["aof_rewrite_in_progress"] == "0" and info["aof_rewrite_scheduled"] == "0":
            return info
        await asyncio.sleep(0.05)


async def kept_by(redis: RedisServer, turns: int) -> list[Figure]:
    """Memory, by what it is for, and file."""
    sizes: Counter[str] = Counter()
    async with await redis.open() as connection:
        names = [str(name) for name in await connection.command("KEYS", "hotdesk{*")]
        for start in range(0, len(names), PAGE):
            page = names[start : start + PAGE]
            for name, size in zip(
                page, await connection.pipeline([("MEMORY", "USAGE", name, "SAMPLES", 0) for name in page]), strict=True
            ):
                sizes[name.partition("}:")[2].partition(":")[0]] += size
    written = await redis.info("persistence")
    rewritten = await rewrite(redis)
    return [
        Figure("an entry of the journal, in memory", sizes["j"] / turns / 2, "bytes"),
        Figure("an id, for 24 to 48 h, in memory", sizes["id"] / turns, "bytes"),
        Figure("a conversation beside its entries, in memory", (sizes["c"] + sizes["seen"]) / CONVERSATIONS, "bytes"),
        Figure("a turn, in the file", int(written["aof_current_size"]) / turns, "bytes"),
        Figure("the same once it was rewritten", int(rewritten["aof_current_size"]) / turns, "bytes"),
    ]


async def record(folder: Path, turns: int) -> tuple[Recording, list[Figure]]:
    """Have a real worker run *turns* turns; what it said, and what Redis keeps of it."""
    async with RedisServer(folder=folder, appendfsync="no", auto_aof_rewrite_percentage=0) as redis:
        recorder = Recorder(redis)
        async with recorder.running():
            worker = await Worker.open(f"{redis.url_at(redis.address, recorder.port)}?partitions={PARTITIONS}")
            try:
                await worker.start()

                async def talk(lane: int) -> None:
                    for number in range(lane, turns, AT_ONCE):
                        name, id = f"c{number % CONVERSATIONS}", f"message-{number}"
                        appended = await worker.append(name, id, text=TEXT)
                        await worker.end(name, appended.seq, reply(name, id, f"reply-{number:020}", ANSWER))

                await asyncio.gather(*map(talk, range(AT_ONCE)))
                recording = Recording(recorder.commands, turns)
                kept = await kept_by(redis, turns)
            finally:
                await worker.aclose()
    return recording, kept


if __name__ == "__main__":
    run_main(measure)
