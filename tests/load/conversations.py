"""What a turn costs with a thousand conversations in the database, and with a million."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path

from tests.load.client import open_loop
from tests.load.cost import compare_costs
from tests.load.desk import message_request
from tests.load.hosts import Server, host_on, work_folder
from tests.load.http_rate import is_answered_nth
from tests.load.report import Figure, run_main
from tests.load.sources import onion

__all__ = ["fill", "measure"]

RATE = 1_000
FILL_RATE = 2_000
TEXT = "a refund, please"


async def measure(short: bool) -> list[Figure]:
    """Fill two data folders, serve both at once, and load them in turn, a random conversation each time."""
    few, many = (200, 4_000) if short else (1_000, 1_000_000)
    seconds, rounds = (2.0, 2) if short else (8.0, 5)
    numbers = count()

    def requests_over(conversations: int) -> Callable[[int], bytes]:
        return lambda n: message_request(f"c{random.randrange(conversations)}", f"m{next(numbers)}", TEXT)

    async with AsyncExitStack() as stack:
        loads: list[tuple[Server, Callable[[int], bytes]]] = []
        for conversations in (few, many):
            folder = stack.enter_context(work_folder(f"conversations-{conversations}"))
            await fill(folder, conversations)
            server = host_on(folder, onion(1))
            stack.push_async_callback(server.stop)
            await server.start()
            loads.append((server, requests_over(conversations)))
        costs, failed = await compare_costs(loads, rate=RATE, seconds=seconds, rounds=rounds)
    return [
        Figure(f"a turn with {few:,} conversations", costs[0], "µs of CPU"),
        Figure(f"a turn with {many:,} conversations", costs[1], "µs of CPU"),
        Figure("the one to the other", costs[1] / costs[0], "times", at_most=1.25),
        Figure("failed", failed, at_most=0),
    ]


async def fill(folder: Path, conversations: int) -> None:
    """Leave a data folder in *folder* with *conversations* conversations, `c0` and on, of one turn each.

    Through the front door, so it takes as long as that many turns do.
    """
    server = host_on(folder, onion(0))
    await server.start()
    try:
        load = await open_loop(
            server.port,
            lambda n: message_request(f"c{n}", f"fill-{n}", TEXT),
            is_answered_nth,
            rate=FILL_RATE,
            seconds=conversations / FILL_RATE,
        )
    finally:
        await server.stop()
    if load.failed:
        raise RuntimeError(f"the database was not filled: {load.failures.most_common(3)}")


if __name__ == "__main__":
    run_main(measure)
