"""2,000 swaps of a WebAssembly plugin that fills its memory: what stays behind in the host's process."""

from __future__ import annotations

import asyncio
import os
from time import perf_counter

from tests.load.desk import Desk
from tests.load.hosts import Server, Usage, host_on, work_folder
from tests.load.leak import LOAD_S, count_guests, growth_kib
from tests.load.report import Figure, run_main
from tests.load.sources import CENSUS
from tests.load.wasm_sources import answering_mark, versioned

__all__ = ["measure"]

STORES = "hotdesk_wasm_stores"
ALIVE = "hotdesk_generations_alive"


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
            generations: list[float] = []
            usages: list[Usage] = []
            counts: list[dict[str, int]] = []
            for versions in (range(1, warm_up + 1), range(warm_up + 1, swaps + 1)):
                usages.clear()
                for version in versions:
                    await _swap(desk, server, version, versioned(wasm, version), stores)
                    usages.append(server.usage())
                    generations.append(await desk.metric(ALIVE) - others)
                at_rest = await _settle(desk, others)
                counts.append(await _count(desk, server))
            desk.close()
        finally:
            await server.stop()
    return [
        Figure("swaps", swaps),
        Figure("stores alive, at most", max(stores), at_most=3),
        Figure("stores alive at rest", at_rest[0], at_most=1),
        Figure("generations alive, at most", max(generations), at_most=3),
        Figure("generations alive at rest", at_rest[1], at_most=1),
        *(Figure(f"{what} more", number - counts[0][what], at_most=0) for what, number in counts[1].items()),
        Figure("RSS after warm-up", usages[0].rss_bytes / 2**20, "MiB"),
        Figure("RSS at the end", usages[-1].rss_bytes / 2**20, "MiB"),
        # A short form sees the allocator settle and not the slope, so it has no target for it.
        Figure(f"RSS a swap, over the last {len(usages):,}", growth_kib(usages), "KiB", at_most=None if short else 4),
    ]


async def _swap(desk: Desk, server: Server, version: int, wasm: bytes, stores: list[float]) -> None:
    """Replace the component, count its stores meanwhile, wait until the new one is ACTIVE, and have it answer."""
    target = server.plugins / "marked.wasm"
    before = (await desk.plugin("marked")).generation or 0
    staged = target.parent.parent / target.name
    staged.write_bytes(wasm)
    os.replace(staged, target)
    began = perf_counter()
    while (status := await desk.plugin("marked")).state != "ACTIVE" or (status.generation or 0) <= before:
        if perf_counter() - began > LOAD_S:
            raise RuntimeError(f"version {version} is not serving: {status}\n{server.log_tail()}")
        stores.append(await desk.metric(STORES))
        await asyncio.sleep(0.005)
    stores.append(await desk.metric(STORES))
    taken = await desk.say("leak", f"m{version}", "who is there?")
    if not taken.replies or f"[v{version:05}]" not in taken.replies[0].text:
        raise RuntimeError(f"version {version} did not answer: {taken}")
    stores.append(await desk.metric(STORES))


async def _settle(desk: Desk, others: float) -> tuple[float, float]:
    """Give the last drain its time; return the stores and the generations that are alive then."""
    for _ in range(round(LOAD_S * 10)):
        if await desk.metric(STORES) <= 1 and await desk.metric(ALIVE) - others <= 1:
            break
        await asyncio.sleep(0.1)
    return await desk.metric(STORES), await desk.metric(ALIVE) - others


async def _count(desk: Desk, server: Server) -> dict[str, int]:
    """What is there at rest: the least of some counts, since the proof that a generation is gone takes a moment."""
    counts = []
    for _ in range(10):
        counts.append(await count_guests(desk, server))
        await asyncio.sleep(0.3)
    return {what: min(count[what] for count in counts) for what in counts[0]}


if __name__ == "__main__":
    run_main(measure)
