"""How long a conversation's context takes to read from Redis: its record with the state, and its last 12 entries.

Cold, it comes from Redis: nobody looked at the conversation since the worker started. Warm, it comes from memory, as
for every further turn of its owner. Beside them, in the same run and of the same hashes: `HGETALL` by redis-py alone,
on a connection that is open, with nothing decoded.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any

import msgspec
from redis.asyncio import Redis
from tests.backend.worker import Worker, reply
from tests.load.client import hold_gc, percentile
from tests.load.hosts import work_folder
from tests.load.report import Figure, run_main
from tests.redis_servers import RedisServer

from hotdesk.backend import ConversationRecord
from hotdesk.chat.recent import Recent

__all__ = ["measure"]

WARM_MS = 0.3
COLD_MS = 1.0
ENTRIES = 12
AT_ONCE = 200
STATE = msgspec.json.encode({"order": 4711, "step": "address", "said": ["refund", "parcel"], "name": "Ann Example"})
TEXT = "Hello, when will I get my refund? The order is number 4711."


async def measure(short: bool) -> list[Figure]:
    """Write conversations turn by turn, then read each, in no order: cold, warm, bare."""
    names = [f"c{number}" for number in range(300 if short else 3_000)]
    with work_folder("redis-context") as folder:
        async with RedisServer(folder=folder) as redis:
            await write(redis.url, names)
            random.shuffle(names)
            worker = await Worker.open(redis.url)  # a new one, which has read nothing
            bare = Redis.from_url(redis.url)
            try:
                await worker.start()
                found = await read_all(worker, bare, names)
            finally:
                await worker.aclose()
                await bare.aclose()
    limits = {"from memory": WARM_MS, "from Redis": COLD_MS}
    return [
        *(
            Figure(f"{what}, p{percent}", percentile(took, percent), "ms", at_most=limit if percent == 99 else None)
            for what, (took, _) in found.items()
            for limit in [next((ms for where, ms in limits.items() if where in what), None)]
            for percent in (50, 99)
        ),
        Figure("not as it was written", sum(wrong for _, wrong in found.values()), at_most=0),
    ]


async def write(url: str, names: list[str]) -> None:
    """Six turns in each conversation, each of which leaves a state."""
    worker = await Worker.open(url)

    async def talk(name: str) -> None:
        for turn in range(ENTRIES // 2):
            appended = await worker.append(name, f"m{turn}", text=TEXT)
            changed = ConversationRecord(name, locale="en", tags=("order",), state=STATE)
            await worker.end(name, appended.seq, reply(name, f"m{turn}", text=TEXT), changed=changed)

    try:
        await worker.start()
        for start in range(0, len(names), AT_ONCE):
            await asyncio.gather(*map(talk, names[start : start + AT_ONCE]))
    finally:
        await worker.aclose()


async def read_all(worker: Worker, bare: Redis, names: list[str]) -> dict[str, tuple[list[float], int]]:
    """Milliseconds of each read of each kind, and how many gave something else than was written."""
    recent = Recent(worker.backend)
    partitions: Any = worker.backend.partitions  # type: ignore[attr-defined]

    async def read_record(name: str) -> bool:
        record = await worker.backend.record(name)
        return record is not None and record.state == STATE

    async def read_entries(name: str) -> bool:
        return len(await recent.newest(name, ENTRIES)) == ENTRIES

    async def read_hash(name: str) -> bool:
        return (await bare.hgetall(partitions.of(name).conversation_key(name)))[b"st"] == STATE

    async def warm_up(name: str) -> None:
        """What the conversation's next turn would do: its record is the owner's from then on."""
        appended = await worker.append(name, "again", text=TEXT)
        await worker.end(name, appended.seq)

    for name in names[:50]:  # the code's first calls, with a memory that is thrown away
        await asyncio.gather(read_record(name), read_entries(name), read_hash(name))
    recent.forget_all()
    cold = await timed(
        {
            "HGETALL by redis-py": read_hash,
            "record, from Redis": read_record,
            f"{ENTRIES} entries, from Redis": read_entries,
        },
        names,
    )
    for start in range(0, len(names), AT_ONCE):
        await asyncio.gather(*map(warm_up, names[start : start + AT_ONCE]))
    warm = {"record, from memory": read_record, f"{ENTRIES} entries, from memory": read_entries}
    return cold | await timed(warm, names)


async def timed(
    kinds: Mapping[str, Callable[[str], Awaitable[bool]]], names: list[str]
) -> dict[str, tuple[list[float], int]]:
    """Read each conversation in each way; the milliseconds, and how many gave something else than they should."""
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    wrong = dict.fromkeys(kinds, 0)
    with hold_gc():
        for name in names:
            for kind, read in kinds.items():
                began = perf_counter()
                right = await read(name)
                took[kind].append((perf_counter() - began) * 1000)
                wrong[kind] += not right
    return {kind: (took[kind], wrong[kind]) for kind in kinds}


if __name__ == "__main__":
    run_main(measure)
