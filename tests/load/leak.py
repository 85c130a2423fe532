"""2,000 swaps of a plugin that clears nothing up: what stays behind in the host's process."""

from __future__ import annotations

import asyncio
from statistics import median
from time import perf_counter

import msgspec
from tests.load.desk import Desk
from tests.load.hosts import Server, Usage, running_host
from tests.load.report import Figure, run_main
from tests.load.sources import CENSUS, dirty
from tests.load.swaps import replace_file

__all__ = ["measure"]

ALIVE = "hotdesk_generations_alive"
LOAD_S = 10.0


async def measure(short: bool) -> list[Figure]:
    """Swap until everything is warm, count, swap on, and count again."""
    swaps, warm_up = (60, 20) if short else (2_000, 500)
    async with running_host("leak", {"census.py": CENSUS, "dirty.py": dirty(0)}) as server:
        desk = Desk(server)
        cold = server.usage()
        # The gauge counts the generations of all plugins; all but dirty.py stay as they are.
        others = await desk.metric(ALIVE) - 1
        alive: list[float] = []
        usages: list[Usage] = []
        counts: list[dict[str, int]] = []
        for versions in (range(1, warm_up + 1), range(warm_up + 1, swaps + 1)):
            usages.clear()
            for version in versions:
                await swap(desk, server, version)
                usages.append(server.usage())
                alive.append(await desk.metric(ALIVE) - others)
            alive_at_rest = await settle(desk, others)
            counts.append(await count_guests(desk, server))
        desk.close()
    return [
        Figure("swaps", swaps),
        Figure("generations alive, at most", max(alive), at_most=3),
        Figure("generations alive at rest", alive_at_rest, at_most=1),
        *(Figure(f"{what} more", number - counts[0][what], at_most=0) for what, number in counts[1].items()),
        Figure("RSS at the start", cold.rss_bytes / 2**20, "MiB"),
        Figure("RSS at the end", usages[-1].rss_bytes / 2**20, "MiB"),
        # A short form sees the allocator settle and not the slope, so it has no target for it.
        Figure(f"RSS a swap, over the last {len(usages):,}", growth_kib(usages), "KiB", at_most=None if short else 2),
    ]


async def swap(desk: Desk, server: Server, version: int) -> None:
    """Replace the file, wait until its code is ACTIVE, and have it answer."""
    before = (await desk.plugin("dirty")).generation or 0
    replace_file(server.plugins / "dirty.py", dirty(version), "rename")
    began = perf_counter()
    while (status := await desk.plugin("dirty")).state != "ACTIVE" or (status.generation or 0) <= before:
        if perf_counter() - began > LOAD_S:
            raise RuntimeError(f"version {version} is not serving: {status}\n{server.log_tail()}")
        await asyncio.sleep(0.005)
    taken = await desk.say("leak", f"m{version}", "who is there?")
    if not taken.replies or f"[v{version}]" not in taken.replies[0].text:
        raise RuntimeError(f"version {version} did not answer: {taken}")


async def settle(desk: Desk, others: float) -> float:
    """Give the last drain its time; return the generations of the plugin that are alive then."""
    for _ in range(round(LOAD_S * 10)):
        if await desk.metric(ALIVE) - others <= 1:
            break
        await asyncio.sleep(0.1)
    return await desk.metric(ALIVE) - others


async def count_guests(desk: Desk, server: Server) -> dict[str, int]:
    """What the system, and a plugin of ours inside the process, see of everybody's leavings."""
    usage = server.usage()
    taken = await desk.say("census", f"census-{perf_counter()}", "census")
    counted: dict[str, int] = msgspec.json.decode(taken.replies[0].text)
    return {"file descriptors": usage.fds, "threads": usage.threads, **counted}


def growth_kib(usages: list[Usage]) -> float:
    """RSS growth a swap: between the medians of the first and the last tenth, which single peaks do not move."""
    tenth = max(1, len(usages) // 10)
    first = median(usage.rss_bytes for usage in usages[:tenth])
    last = median(usage.rss_bytes for usage in usages[-tenth:])
    return (last - first) / 1024 / max(1, len(usages) - tenth)


if __name__ == "__main__":
    run_main(measure)
