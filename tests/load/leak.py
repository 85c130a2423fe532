"""2,000 swaps of a plugin that clears nothing up: what stays behind in the host's process."""

from __future__ import annotations

import asyncio
from statistics import median
from time import perf_counter

from tests.load.desk import Desk
from tests.load.hosts import Server, Usage, running_host
from tests.load.report import Figure, run_main
from tests.load.sources import dirty
from tests.load.swaps import replace_file

__all__ = ["measure"]

LOAD_S = 10.0


async def measure(short: bool) -> list[Figure]:
    """Swap, wait until the new generation serves, have it answer, look at the process; again and again."""
    swaps, warm_up = (60, 20) if short else (2_000, 500)
    async with running_host("leak", {"dirty.py": dirty(0)}) as server:
        desk = Desk(server)
        usages = [server.usage()]
        alive = 0.0
        for version in range(1, swaps + 1):
            await swap(desk, server, version)
            usages.append(server.usage())
            alive = max(alive, await desk.metric("hotdesk_generations_alive", "dirty"))
        await settle(desk)
        alive_at_rest = await desk.metric("hotdesk_generations_alive", "dirty")
        usages.append(server.usage())
        desk.close()
    warm, last = usages[warm_up], usages[-1]
    return [
        Figure("swaps", swaps),
        Figure("generations alive, at most", alive, at_most=3),
        Figure("generations alive at rest", alive_at_rest, at_most=3),
        Figure("file descriptors more", last.fds - warm.fds, at_most=0),
        Figure("threads more", last.threads - warm.threads, at_most=0),
        Figure("RSS at the start", usages[0].rss_bytes / 2**20, "MiB"),
        Figure("RSS at the end", last.rss_bytes / 2**20, "MiB"),
        # A short form sees the allocator settle and not the slope, so it has no target for it.
        Figure("RSS a swap", growth_kib(usages[warm_up:]), "KiB", at_most=None if short else 2),
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


async def settle(desk: Desk) -> None:
    """Give the last drain its time."""
    for _ in range(round(LOAD_S * 10)):
        if await desk.metric("hotdesk_generations_alive", "dirty") <= 1:
            break
        await asyncio.sleep(0.1)


def growth_kib(usages: list[Usage]) -> float:
    """RSS growth a swap: between the medians of the first and the last tenth, which single peaks do not move."""
    tenth = max(1, len(usages) // 10)
    first = median(usage.rss_bytes for usage in usages[:tenth])
    last = median(usage.rss_bytes for usage in usages[-tenth:])
    return (last - first) / 1024 / max(1, len(usages) - tenth)


if __name__ == "__main__":
    run_main(measure)
