"""What a turn costs with a thousand conversations in the database, and with a million."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import count

from tests.load.cost import compare_costs
from tests.load.desk import message_request
from tests.load.fill import fill_journal
from tests.load.hosts import Server, host_on, work_folder
from tests.load.report import Figure, run_main
from tests.load.sources import onion

__all__ = ["measure"]

RATE = 1_000
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
            await asyncio.to_thread(fill_journal, folder / "data" / "hotdesk.db", conversations)
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


if __name__ == "__main__":
    run_main(measure)
