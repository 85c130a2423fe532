"""What one more pass-through middleware costs a turn, where there are 1, 10 and 50 of them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from itertools import count

from tests.load.cost import compare_costs
from tests.load.desk import message_request
from tests.load.hosts import running_host
from tests.load.report import Figure, run_main
from tests.load.sources import onion

__all__ = ["measure"]

DEPTHS = (0, 1, 10, 50)
RATE = 1_000
CONVERSATIONS = 1_000


async def measure(short: bool) -> list[Figure]:
    """One host for each depth, all up at once, loaded in turn; the slope between neighbours is the cost."""
    seconds, rounds = (1.5, 2) if short else (8.0, 5)
    numbers = count()

    def request(n: int) -> bytes:
        return message_request(f"c{n % CONVERSATIONS}", f"m{next(numbers)}", "a refund, please")

    async with AsyncExitStack() as stack:
        loads = [
            (await stack.enter_async_context(running_host(f"onion-{depth}", onion(depth))), request) for depth in DEPTHS
        ]
        costs, failed = await compare_costs(loads, rate=RATE, seconds=seconds, rounds=rounds)
    figures = [
        Figure(f"a turn through {depth} middleware", cost, "µs of CPU")
        for depth, cost in zip(DEPTHS, costs, strict=True)
    ]
    for low, high in zip(range(len(DEPTHS)), range(1, len(DEPTHS)), strict=False):
        more = DEPTHS[high] - DEPTHS[low]
        figures.append(
            Figure(
                f"one more, from {DEPTHS[low]} to {DEPTHS[high]}",
                (costs[high] - costs[low]) / more,
                "µs of CPU",
                at_most=20,
            )
        )
    return [*figures, Figure("failed", failed, at_most=0)]


if __name__ == "__main__":
    run_main(measure)
