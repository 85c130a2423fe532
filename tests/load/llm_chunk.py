"""What one chunk costs the host, from the model server's socket to a visitor's WebSocket.

Beside it a bare aiohttp server that iterates `create(stream=True)` and sends each delta as a frame. Twice: at the pace
of a model, where every chunk is a segment and a wake-up of its own, and in a burst, where many come in one read. From
the CPU of a stretch the idle host's is taken off. The desk's bot is the bundled `chatgpt`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from statistics import median

from tests.load.client import hold_gc
from tests.load.hosts import Server
from tests.load.llm_servers import running_bot, running_desk, running_model
from tests.load.llm_visitors import FAULTS, BotVisitor, DeskVisitor, faults_of, tokens_of, wait_for
from tests.load.report import Figure, run_main

__all__ = ["measure"]

STREAMS, RATE = 100, 20
"""As many as the bare server can keep up with."""

BURST_STREAMS, BURST_TOKENS = 8, 1_000
RAMP_S = 1.0
MOST_US = 20.0
LEAST_TIMES = 10.0

Kind = type[DeskVisitor] | type[BotVisitor]


async def measure(short: bool) -> list[Figure]:
    """Both servers in turn, round after round; the medians."""
    rounds, seconds, asks = (1, 2.0, 2) if short else (3, 10.0, 4)
    tokens = round((seconds + 2 * RAMP_S) * RATE)
    faults: Counter[str] = Counter()
    costs: dict[str, list[float]] = {name: [] for name in ("paced desk", "paced bare", "burst desk", "burst bare")}
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(running_model())
        for mode, url in (
            ("paced", f"http://127.0.0.1:{model.port}/{tokens}/{RATE}/v1"),
            ("burst", f"http://127.0.0.1:{model.port}/{BURST_TOKENS}/0/v1"),
        ):
            async with running_desk("llm-chunk", url) as desk, running_bot(url) as bot:
                for number in range(rounds):
                    for name, server, kind in (("desk", desk, DeskVisitor), ("bare", bot, BotVisitor)):
                        if mode == "paced":
                            cost, found = await paced(server, kind, number, seconds, tokens)
                        else:
                            await burst(server, kind, f"warm{number}", 1)
                            cost, found = await burst(server, kind, f"burst{number}", asks)
                        costs[f"{mode} {name}"].append(cost)
                        faults += found
    us = {name: median(found) for name, found in costs.items()}
    figures = []
    for mode, words in (("paced", f"at {RATE}/s in {STREAMS} streams"), ("burst", "in a burst")):
        desk_us, bare_us = us[f"{mode} desk"], us[f"{mode} bare"]
        figures += [
            Figure(f"a chunk {words}", desk_us, "µs of CPU", at_most=MOST_US),
            Figure(f"create(stream=True), a chunk {words}", bare_us, "µs of CPU"),
            Figure("the one beside the other", bare_us / desk_us, "times", at_least=LEAST_TIMES),
        ]
    return [*figures, *(Figure(kind, faults[kind], at_most=0) for kind in FAULTS)]


async def seated(server: Server, kind: Kind, name: str, number: int) -> list[DeskVisitor | BotVisitor]:
    """That many visitors, each in a conversation of its own."""
    visitors = [kind() for _ in range(number)]
    await asyncio.gather(*(visitor.come(server.port, f"{name}-{n}") for n, visitor in enumerate(visitors)))
    return visitors


async def idle_cores(server: Server, seconds: float) -> float:
    """The CPU that the server spends a second when nothing happens."""
    await asyncio.sleep(0.3)
    before = server.usage().cpu_s
    await asyncio.sleep(seconds)
    return (server.usage().cpu_s - before) / seconds


async def paced(
    server: Server, kind: Kind, number: int, seconds: float, tokens: int
) -> tuple[float, Counter[str]]:
    """CPU a chunk in µs while all streams are in their middle, and what was wrong."""
    visitors = await seated(server, kind, f"paced{number}", STREAMS)
    idle = await idle_cores(server, seconds / 3)
    with hold_gc():
        for visitor in visitors:  # not in step: each chunk comes alone
            visitor.ask()
            await asyncio.sleep(RAMP_S / STREAMS)
        while not all(visitor.heard[0].texts for visitor in visitors):
            await asyncio.sleep(0.01)
        cpu_s, heard = server.usage().cpu_s, tokens_of(visitors)
        await asyncio.sleep(seconds)
        cpu_s, heard = server.usage().cpu_s - cpu_s, tokens_of(visitors) - heard
        await wait_for(visitors, 30.0)
    for visitor in visitors:
        visitor.leave()
    return (cpu_s - idle * seconds) / heard * 1e6, faults_of(visitors, tokens)


async def burst(server: Server, kind: Kind, name: str, asks: int) -> tuple[float, Counter[str]]:
    """CPU a chunk in µs, the turns' own cost included, and what was wrong."""
    visitors = await seated(server, kind, name, BURST_STREAMS)
    before = server.usage().cpu_s
    with hold_gc():
        for visitor in visitors:
            visitor.ask(more=asks - 1)
        await wait_for(visitors, 60.0)
    cpu_s = server.usage().cpu_s - before
    for visitor in visitors:
        visitor.leave()
    return cpu_s / tokens_of(visitors) * 1e6, faults_of(visitors, BURST_TOKENS)


if __name__ == "__main__":
    run_main(measure)
