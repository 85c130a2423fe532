"""What it costs to be there, with nobody saying anything: one real worker among 1 to 1,000 others.

The others are leases in Redis that last as long as the run, as of workers on other machines. What one worker costs
among N, N workers cost N times. Each reads who else is there when somebody comes or goes, and not otherwise.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import replace
from statistics import median
from typing import Any

import hiredis
import msgspec
from tests.backend.worker import Worker
from tests.load.hosts import work_folder
from tests.load.redis_desk import RedisDesk, Spent
from tests.load.report import Figure, run_main
from tests.redis_servers import RedisServer

from hotdesk.backend.redis_members import BEAT_S, About, members_keys
from hotdesk.backend.redis_wire import Scripts

__all__ = ["measure"]

PARTITIONS = 1_024
"""More than workers, as it should be."""

LEASE_MS = 3_600_000
CHANNELS = 20_000
CALLS = 5
CROWD = 100
SERVERS = 10
SLOTS = 16_384


async def measure(short: bool) -> list[Figure]:
    """The same worker among more and more, then the heartbeats of many; then what a channel takes."""
    seconds = 2.0 if short else 8.0
    figures: list[Figure] = []
    with work_folder("redis-presence") as folder:
        for workers in (1, 10, 100) if short else (1, 10, 100, 1_000):
            async with RedisServer(folder=folder) as redis:
                await seat_others(redis, workers - 1)
                spent, plan_s = await spent_among(redis, seconds)
            figures += [
                Figure(f"among {workers:,}, a second, the worker", spent.hosts_cpu_us / 1000, "ms of CPU"),
                Figure(f"among {workers:,}, a second, Redis for it", spent.redis_cpu_us / 1000, "ms of CPU"),
                Figure(f"among {workers:,}, a second, from Redis to it", spent.kib_out, "KiB"),
                Figure(f"among {workers:,}, who should own what, worked out once", plan_s * 1000, "ms of CPU"),
            ]
        for workers in (30, 100, 300):
            async with RedisServer(folder=folder) as redis:
                spent = await spent_on_heartbeats(redis, workers, seconds)
            figures += [
                Figure(f"heartbeats of {workers}, a second, Redis", spent.redis_cpu_us / 1000, "ms of CPU"),
                Figure(f"heartbeats of {workers}, a second, from Redis", spent.kib_out / 1024, "MiB"),
            ]
        async with RedisServer(folder=folder) as redis:
            figures.append(Figure("a channel that is subscribed to, in Redis", await channel_bytes(redis), "bytes"))
            for partitions in (256, 1_024, 4_096):
                figures += await spread(redis, partitions)
    return figures


class Heartbeats:
    """The beats of workers on other machines, made by the host's own script."""

    def __init__(self, workers: int, known: bytes = b"") -> None:
        scripts = Scripts()
        self.script = ("SCRIPT", "LOAD", scripts.sources["beat"])
        self.all = [
            scripts.pack(
                "beat",
                members_keys("hotdesk"),
                (f"w0{number:020x}", LEASE_MS, msgspec.json.encode(about_one(number)), known, ""),
            )
            for number in range(workers)
        ]


def about_one(number: int) -> About:
    """What is to be known of a worker on another machine."""
    boot = f"{number:08x}-0000-4000-8000-000000000000 4026531836"
    return About(f"host-{number}", f"host-{number}.desk.example", 1000 + number, boot)


async def seat_others(redis: RedisServer, count: int) -> bytes:
    """Leases of *count* workers; the number of what all of them know then."""
    beats = Heartbeats(count)
    async with await redis.open() as connection:
        await connection.command(*beats.script)
        number = b""
        for beat in beats.all:
            number = str((await connection.command(*beat))[2]).encode()
        return number


async def spent_on_heartbeats(redis: RedisServer, workers: int, seconds: float) -> Spent:
    """What a second costs Redis in which *workers* are there: each beats four times, evenly."""
    known = await seat_others(redis, workers)
    beats = [hiredis.pack_command(beat) for beat in Heartbeats(workers, known).all]
    reader, writer = await asyncio.open_connection(redis.address, redis.port)
    answers, loop = hiredis.Reader(), asyncio.get_running_loop()
    desk = RedisDesk(redis, ())
    before, began, beaten = await desk.spent(), loop.time(), 0
    while (now := loop.time() - began) < seconds:
        for _ in range(beaten, due := int(now / BEAT_S * workers)):
            writer.write(beats[beaten % workers])
            while answers.gets() is False:
                answers.feed(await reader.read(2**20))
            beaten += 1
        await asyncio.sleep(max(0.0, (due + 1) / workers * BEAT_S - now))
    spent = (await desk.spent() - before).each(beaten * BEAT_S / workers)
    writer.close()
    return spent


async def spent_among(redis: RedisServer, seconds: float) -> tuple[Spent, float]:
    """What a second costs a real worker, which is this process, and Redis; and how long a plan holds its loop."""
    worker = await Worker.open(f"{redis.url}?partitions={PARTITIONS}")
    try:
        await worker.start()
        desk = RedisDesk(redis, ())
        before, own = await desk.spent(), time.process_time()
        await asyncio.sleep(seconds)
        own = time.process_time() - own
        spent = (await desk.spent() - before).each(seconds)
        plan_s = median([plan(worker) for _ in range(CALLS)])
    finally:
        await worker.aclose()
    return replace(spent, hosts_cpu_us=own / seconds * 1e6), plan_s


def plan(worker: Worker) -> float:
    """The CPU seconds that a worker needs to work out whose each partition should be: when one comes, and one goes."""
    backend: Any = worker.backend
    names = tuple(backend.members.alive)
    began = time.process_time()
    for partition in backend.partitions.all:
        backend.members.owner_of(partition.number, names)
    return time.process_time() - began


async def spread(redis: RedisServer, partitions: int) -> list[Figure]:
    """How much more than the mean falls to whoever has most: of 100 workers, and of a Cluster's servers."""
    worker = await Worker.open(f"{redis.url}?partitions={partitions}&prefix=p{partitions}")
    try:
        backend: Any = worker.backend
        fullest = []
        for _ in range(CALLS):
            names = tuple(f"w{random.getrandbits(84):021x}" for _ in range(CROWD))
            owned = Counter(backend.members.owner_of(number, names) for number in range(partitions))
            fullest.append(max(owned.values()) / partitions * CROWD)
        servers = Counter(partition.slot * SERVERS // SLOTS for partition in backend.partitions.all)
    finally:
        await worker.aclose()
    return [
        Figure(f"{partitions:,} partitions of {CROWD} workers, the fullest", median(fullest), "times the mean"),
        Figure(
            f"{partitions:,} partitions on {SERVERS} servers of a Cluster, the fullest",
            max(servers.values()) / partitions * SERVERS,
            "times the mean",
        ),
    ]


async def channel_bytes(redis: RedisServer) -> float:
    """The memory that one subscription to one channel takes, of which a worker has an inbox in every partition."""
    async with await redis.open() as connection, await redis.open() as other:

        async def used() -> int:
            memory = str(await other.command("INFO", "memory"))
            return int(memory.partition("used_memory:")[2].split(maxsplit=1)[0])

        before = await used()
        await connection.pipeline([("SSUBSCRIBE", f"hotdesk{{{n}}}:h:w{n:021x}") for n in range(CHANNELS)])
        return (await used() - before) / CHANNELS


if __name__ == "__main__":
    run_main(measure)
