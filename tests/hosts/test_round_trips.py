"""What a turn waits for: few round trips to Redis, whichever host it came in at."""

from __future__ import annotations

import asyncio
import time

from tests.hosts.conftest import TALKER, Hosts, settled
from tests.redis_servers import Link, RedisServer

from conftest import StartDesk

WAY_S = 0.1
"""What the relay adds each way: much more than all else in a turn takes."""


async def test_a_turn_waits_for_three_round_trips_at_the_most(start_desk: StartDesk, redis: RedisServer) -> None:
    """Two where the conversation is owned, append and end; at another host the news of it, a way each, beside."""
    async with await Link.open(redis.port) as link:
        url = f"redis://127.0.0.1:{link.port}/0?partitions=8"
        a = await start_desk({"talker.py": TALKER}, backend=url)
        b = await start_desk({"talker.py": TALKER}, backend=url)
        await settled(a, b)
        hosts = Hosts(a, b, (f"c{number}" for number in range(1000)))
        conversation = hosts.owned_by(a)
        await a.say("warm", conversation)
        link.delay_s = WAY_S
        for desk, ways in ((a, 4), (b, 6)):
            took = []
            for _ in range(3):
                began = time.perf_counter()
                await desk.say("hello", conversation)
                took.append(time.perf_counter() - began)
            assert min(took) < (ways + 1) * WAY_S, (desk is a, took)
        link.delay_s = 0.0


async def test_turns_of_one_moment_travel_together(start_desk: StartDesk, redis: RedisServer) -> None:
    """A hundred turns that begin at once need a few batches, and not two hundred: their commands go together."""
    desk = await start_desk({"talker.py": TALKER}, backend=f"{redis.url}?partitions=8")
    await desk.say("warm")
    registry = desk.host.metrics.registry

    def batches() -> float:
        return registry.get_sample_value("hotdesk_backend_commit_seconds_count") or 0

    before, writes = batches(), registry.get_sample_value("hotdesk_backend_writes_total") or 0
    await asyncio.gather(*(desk.say("hello", f"c{number}") for number in range(100)))
    assert (registry.get_sample_value("hotdesk_backend_writes_total") or 0) - writes >= 200
    assert batches() - before < 100
