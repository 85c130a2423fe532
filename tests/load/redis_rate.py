"""HTTP turns a second on Redis beside SQLite, kept on the same disk both ways, and with two workers beside one.

Redis (`appendfsync always`) and the load generator share the two cores with the workers.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from statistics import median

from tests.load.client import Load, closed_loop
from tests.load.hosts import Server, running_host
from tests.load.http_rate import is_answered, turn_requests, visitor_requests
from tests.load.redis_desk import Spent, cpu_of, running_redis_desk
from tests.load.report import Figure, ratio, run_main
from tests.load.sources import onion

__all__ = ["measure"]

CONNECTIONS = 64
WORKERS = {"one worker": 1, "two workers": 2}
MANY = 256
CROWD = f", {MANY} visitors"
MIXED = ", many conversations a connection"


async def measure(short: bool) -> list[Figure]:
    """Alternate all in rounds and compare within each, so that a busy neighbour meets all.

    A connection is one visitor's, in one conversation. Once more with many of them, for the fewer each worker has the
    smaller are its batches; and once more as a proxy's, which are many visitors'.
    """
    rounds, seconds = (2, 1.5) if short else (7, 6.0)
    loads: dict[str, list[Load]] = {}
    costs: dict[str, list[Spent]] = {}
    sqlite_us: list[float] = []
    requests = {
        "": (visitor_requests(), CONNECTIONS),
        CROWD: (visitor_requests(), MANY),
        MIXED: (turn_requests(), CONNECTIONS),
    }
    async with AsyncExitStack() as stack:
        sqlite = await stack.enter_async_context(running_host("redis-rate", onion(3)))
        desks = {
            name: await stack.enter_async_context(running_redis_desk("redis-rate", onion(3), workers=workers))
            for name, workers in WORKERS.items()
        }

        async def load_one(server: Server, kind: str, seconds: float) -> Load:
            asked, connections = requests[kind]
            return await closed_loop(server.port, asked, is_answered, connections=connections, seconds=seconds)

        for server in (sqlite, *(desk.hosts[0] for desk in desks.values())):
            await load_one(server, "", 1.0)  # warms it up
        for _ in range(rounds):
            before = cpu_of(sqlite)
            load = await load_one(sqlite, "", seconds)
            sqlite_us.append((cpu_of(sqlite) - before) / load.answered * 1e6)
            loads.setdefault("SQLite", []).append(load)
            for kind in requests:
                for name, desk in desks.items():
                    start = await desk.spent()
                    load = await load_one(desk.hosts[0], kind, seconds)
                    costs.setdefault(name + kind, []).append((await desk.spent() - start).each(load.answered))
                    loads.setdefault(name + kind, []).append(load)
    rates = {name: [load.rate for load in found] for name, found in loads.items()}
    gains = {kind: ratio(rates, f"two workers{kind}", f"one worker{kind}") for kind in requests}
    return [
        *(Figure(f"{name}", median(found), "turns/s") for name, found in rates.items()),
        Figure("one worker beside SQLite", ratio(rates, "one worker", "SQLite") * 100, "%", at_least=50),
        *(Figure(f"two workers beside one{kind}", gain, "times", at_least=1) for kind, gain in gains.items()),
        Figure("SQLite, a turn", median(sqlite_us), "µs of CPU"),
        *(figure for name, found in costs.items() for figure in cost_figures(name, found)),
        *(
            Figure(f"{name}, p99", median(load.percentile_ms(99) for load in found), "ms")
            for name, found in loads.items()
        ),
        Figure("failed", sum(load.failed for found in loads.values() for load in found), at_most=0),
    ]


def cost_figures(name: str, found: list[Spent]) -> list[Figure]:
    """What a turn costs, the medians of the rounds."""
    return [
        Figure(f"{name}, a turn", median(one.hosts_cpu_us for one in found), "µs of CPU"),
        Figure(f"{name}, a turn of Redis'", median(one.redis_cpu_us for one in found), "µs of CPU"),
        Figure(f"{name}, scripts a turn", median(one.scripts for one in found)),
        Figure(f"{name}, commands a turn, those in scripts too", median(one.commands for one in found)),
        Figure(f"{name}, to Redis a turn", median(one.kib_in for one in found), "KiB"),
        Figure(f"{name}, from Redis a turn", median(one.kib_out for one in found), "KiB"),
    ]


if __name__ == "__main__":
    run_main(measure)
