"""What a turn costs the hosts and Redis (CPU, commands, bytes) with 1 to 8 workers and with 16 to 1,024 partitions.

All on the same two cores, at fixed rates: workers once with the same traffic in all, which each has less and less of,
and once with traffic that grows with them. A connection is one visitor's, in one conversation; with the same traffic in
all it is also measured as a proxy's, on which many visitors' messages go by turns. What is spent where nobody says
anything (heartbeats, looks at what went missing) is measured apart, before the load, and taken off: a turn's own cost
is what grows with traffic, and that of being there is a host's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from statistics import median
from time import monotonic

from tests.load.client import open_loop
from tests.load.http_rate import is_answered_nth, turn_requests, visitor_requests
from tests.load.redis_desk import RedisDesk, Spent, running_redis_desk
from tests.load.report import Figure, run_main
from tests.load.sources import onion

__all__ = ["measure"]

RATE = 600
RATE_EACH = 75
"""A second, of each worker: eight have `RATE`."""

CONNECTIONS = 64
PARTITIONS = 256
"""Where the workers are what differs."""

WORKERS = 2
"""Where the partitions are."""

GROWTH = 1.2
COSTS: dict[str, tuple[str, Callable[[Spent], float]]] = {
    "hosts": ("µs of CPU", lambda spent: spent.hosts_cpu_us),
    "Redis": ("µs of CPU", lambda spent: spent.redis_cpu_us),
    "commands": ("", lambda spent: spent.commands),
    "bytes": ("KiB", lambda spent: spent.kib_in + spent.kib_out),
}


@dataclass(slots=True)
class Found:
    """What one kind of desk cost, in each pass."""

    workers: int
    partitions: int
    rate: int
    """Turns a second."""

    mixed: bool = False
    """Whether each connection carries messages of all conversations."""

    idle: list[Spent] = field(default_factory=list)
    """A second of nothing."""

    turn: list[Spent] = field(default_factory=list)
    """A turn, without its share of that."""

    failed: int = 0


async def measure(short: bool) -> list[Figure]:
    """Each kind of desk alone on the machine, one after the other, in several passes."""
    passes, seconds = (1, 3.0) if short else (3, 8.0)
    several = (1, 2) if short else (1, 2, 4, 8)
    together = {workers: Found(workers, PARTITIONS, RATE) for workers in several}
    each = {workers: Found(workers, PARTITIONS, RATE_EACH * workers) for workers in several}
    mixed = {workers: Found(workers, PARTITIONS, RATE, mixed=True) for workers in (several[0], several[-1])}
    spread = {
        partitions: Found(WORKERS, partitions, RATE, mixed=True)
        for partitions in ((16, 256) if short else (16, 64, 256, 1_024))
    }
    kinds = {
        f"workers, {RATE}/s in all": together,
        f"workers, {RATE_EACH}/s each": each,
        f"workers, {RATE}/s in all, many conversations a connection": mixed,
        "partitions": spread,
    }
    for _ in range(passes):
        for desks in kinds.values():
            for found in desks.values():
                await cost_one(found, seconds)
    return [
        *(figure for what, desks in kinds.items() for figure in figures_of(what, desks)),
        *(
            figure
            for what, desks in kinds.items()
            if desks in (together, spread)
            for figure in idle_figures_of(what, desks)
        ),
        Figure("failed", sum(found.failed for desks in kinds.values() for found in desks.values()), at_most=0),
    ]


async def cost_one(found: Found, seconds: float) -> None:
    """Start a desk, let it be, load it, and note both costs."""
    asked, drawn = turn_requests() if found.mixed else visitor_requests(), Random(1)

    async def load(desk: RedisDesk, seconds: float) -> int:
        done = await open_loop(
            desk.hosts[0].port,
            lambda n: asked(drawn.randrange(CONNECTIONS) if found.mixed else n % CONNECTIONS, n),
            is_answered_nth,
            rate=found.rate,
            seconds=seconds,
            connections=CONNECTIONS,
            pinned=not found.mixed,
        )
        found.failed += done.failed
        return done.answered

    async with running_redis_desk("redis-cost", onion(3), workers=found.workers, partitions=found.partitions) as desk:
        await load(desk, 2.0)  # warms it up
        idle = await desk.idle(seconds)
        before, began = await desk.spent(), monotonic()
        answered = await load(desk, seconds)
        spent = await desk.spent() - before
        found.idle.append(idle)
        found.turn.append(spent.less(idle, monotonic() - began).each(answered))


def figures_of(what: str, desks: dict[int, Found]) -> list[Figure]:
    """A turn's cost in each kind, and what it grew by from the least to the most."""
    figures = []
    for cost, (unit, read) in COSTS.items():
        values = {number: median(read(spent) for spent in found.turn) for number, found in desks.items()}
        figures += [Figure(f"{number:,} {what}: a turn, {cost}", value, unit) for number, value in values.items()]
        first, *_, last = values
        grown = values[last] / values[first]
        figures.append(Figure(f"{last:,} {what}, beside {first:,}: {cost}", grown, "times", at_most=GROWTH))
    return figures


def idle_figures_of(what: str, desks: dict[int, Found]) -> list[Figure]:
    """What a second of nothing costs in each kind."""
    kind = what.partition(",")[0]
    return [
        Figure(f"{number:,} {kind}: a second of nothing, {cost}", median(map(read, found.idle)), unit)
        for cost, (unit, read) in COSTS.items()
        for number, found in desks.items()
    ]


if __name__ == "__main__":
    run_main(measure)
