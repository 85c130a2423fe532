"""2,000 swaps of a plugin that clears nothing up: what stays behind in the host's process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

import msgspec
from tests.load.desk import Desk
from tests.load.hosts import Server, Usage, running_host
from tests.load.report import Figure, run_main
from tests.load.sources import CENSUS, dirty
from tests.load.swaps import replace_file

__all__ = ["ALIVE", "count_guests", "growth_kib", "measure", "settle", "swap"]

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
                await swap(desk, server, "dirty.py", data=dirty(version).encode(), mark=f"v{version}")
                usages.append(server.usage())
                alive.append(await desk.metric(ALIVE) - others)
            at_rest = await settle(desk, {ALIVE: others + 1})
            counts.append(await count_guests(desk, server))
        desk.close()
    return [
        Figure("swaps", swaps),
        Figure("generations alive, at most", max(alive), at_most=3),
        Figure("generations alive at rest", at_rest[ALIVE] - others, at_most=1),
        *(Figure(f"{what} more", number - counts[0][what], at_most=0) for what, number in counts[1].items()),
        Figure("RSS at the start", cold.rss_bytes / 2**20, "MiB"),
        Figure("RSS at the end", usages[-1].rss_bytes / 2**20, "MiB"),
        # A short form sees the allocator settle and not the slope, so it has no target for it.
        Figure(f"RSS a swap, over the last {len(usages):,}", growth_kib(usages), "KiB", at_most=None if short else 2),
    ]


async def look_away() -> None:
    """What there is to look at while a swap goes on, where nothing is."""


async def swap(
    desk: Desk,
    server: Server,
    file: str,
    *,
    data: bytes,
    mark: str,
    look: Callable[[], Awaitable[None]] = look_away,
) -> None:
    """Replace a plugin's file, wait until its code is ACTIVE, and have it answer with *mark*; *look* all the while."""
    plugin = Path(file).stem
    before = (await desk.plugin(plugin)).generation or 0
    replace_file(server.plugins / file, data)
    began = perf_counter()
    while (status := await desk.plugin(plugin)).state != "ACTIVE" or (status.generation or 0) <= before:
        if perf_counter() - began > LOAD_S:
            raise RuntimeError(f"{mark} is not serving: {status}\n{server.log_tail()}")
        await look()
        await asyncio.sleep(0.005)
    await look()
    taken = await desk.say("leak", f"m-{mark}", "who is there?")
    if not taken.replies or f"[{mark}]" not in taken.replies[0].text:
        raise RuntimeError(f"{mark} did not answer: {taken}")
    await look()


async def settle(desk: Desk, most: Mapping[str, float]) -> dict[str, float]:
    """Give the last drain its time, until each metric is at its *most* or below; return what they are then."""
    for _ in range(round(LOAD_S * 10)):
        found = {name: await desk.metric(name) for name in most}
        if all(found[name] <= most[name] for name in most):
            break
        await asyncio.sleep(0.1)
    return found


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
