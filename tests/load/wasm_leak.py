"""2,000 swaps of a WebAssembly plugin that fills its memory: what stays behind in the host's process."""

from __future__ import annotations

import asyncio

from tests.load.desk import Desk
from tests.load.hosts import Server, Usage, host_on, work_folder
from tests.load.leak import ALIVE, count_guests, growth_kib, settle, swap
from tests.load.report import Figure, run_main
from tests.load.sources import CENSUS
from tests.load.wasm_sources import answering_mark, versioned

__all__ = ["measure"]

STORES = "hotdesk_wasm_stores"


async def measure(short: bool) -> list[Figure]:
    """Swap until everything is warm, count, swap on, and count again. Each message is the only one under way, so a
    generation has one store."""
    swaps, warm_up = (60, 20) if short else (2_000, 500)
    wasm = answering_mark()
    with work_folder("wasm-leak") as folder:
        server = host_on(folder, {"census.py": CENSUS})
        (server.plugins / "marked.wasm").write_bytes(versioned(wasm, 0))
        try:
            await server.start()
            desk = Desk(server)
            others = await desk.metric(ALIVE) - 1
            stores: list[float] = []

            async def look() -> None:
                stores.append(await desk.metric(STORES))

            generations: list[float] = []
            usages: list[Usage] = []
            counts: list[dict[str, int]] = []
            for versions in (range(1, warm_up + 1), range(warm_up + 1, swaps + 1)):
                usages.clear()
                for version in versions:
                    data = versioned(wasm, version)
                    await swap(desk, server, "marked.wasm", data=data, mark=f"v{version:05}", look=look)
                    usages.append(server.usage())
                    generations.append(await desk.metric(ALIVE) - others)
                at_rest = await settle(desk, {STORES: 1, ALIVE: others + 1})
                counts.append(await _count(desk, server, counts[0] if counts else {}))
            desk.close()
        finally:
            await server.stop()
    return [
        Figure("swaps", swaps),
        Figure("stores alive, at most", max(stores), at_most=3),
        Figure("stores alive at rest", at_rest[STORES], at_most=1),
        Figure("generations alive, at most", max(generations), at_most=3),
        Figure("generations alive at rest", at_rest[ALIVE] - others, at_most=1),
        *(Figure(f"{what} more", number - counts[0][what], at_most=0) for what, number in counts[1].items()),
        Figure("RSS after warm-up", usages[0].rss_bytes / 2**20, "MiB"),
        Figure("RSS at the end", usages[-1].rss_bytes / 2**20, "MiB"),
        # A short form sees the allocator settle and not the slope, so it has no target for it.
        Figure(f"RSS a swap, over the last {len(usages):,}", growth_kib(usages), "KiB", at_most=None if short else 4),
    ]


async def _count(desk: Desk, server: Server, before: dict[str, int]) -> dict[str, int]:
    """What is there at rest: the least of some counts, since the proof that a generation is gone takes a moment. They
    end when there is no more of anything than *before*."""
    counts: list[dict[str, int]] = []
    least: dict[str, int] = {}
    for _ in range(10):
        counts.append(await count_guests(desk, server))
        least = {what: min(count[what] for count in counts) for what in counts[0]}
        if before and all(least[what] <= before[what] for what in least):
            break
        await asyncio.sleep(0.3)
    return least


if __name__ == "__main__":
    run_main(measure)
