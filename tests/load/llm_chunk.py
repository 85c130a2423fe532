"""What one chunk costs the host, from the model server's socket to a visitor's WebSocket.

Beside it a bare aiohttp server that iterates `create(stream=True)` and sends each delta as a frame. Twice: at the pace
of a model, where every chunk is a segment and a wake-up of its own, and in a burst, where many come in one read. From
the CPU of a stretch the idle host's is taken off. The desk's bot is the bundled `chatgpt`. The floor under both is a
relay that only copies the bytes: what the loop and the kernel take for a chunk of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

from tests.load.client import hold_gc
from tests.load.hosts import Server
from tests.load.llm_servers import running_bot, running_desk, running_model, running_relay
from tests.load.llm_visitors import (
    FAULTS,
    BotVisitor,
    DeskVisitor,
    ModelReader,
    Visitor,
    faults_of,
    tokens_of,
    wait_first,
    wait_for,
)
from tests.load.report import Figure, run_main

__all__ = ["measure"]

STREAMS, RATE = 100, 20
"""As many as the bare server can keep up with."""

BURST_STREAMS = 8
MOST_US = 20.0
LEAST_TIMES = 10.0

Kind = Callable[[], Visitor]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the answers are counted in their middle, how long they take to begin, and the idle host is watched."""

    counted_s: float
    ramp_s: float
    idle_s: float

    @property
    def tokens(self) -> int:
        """Of one answer, which lasts over all that is counted and both ramps."""
        return round((self.counted_s + 2 * self.ramp_s) * RATE)


async def measure(short: bool) -> list[Figure]:
    """All servers in turn, round after round; the medians."""
    rounds, asks, burst_tokens = (1, 2, 300) if short else (3, 4, 1_000)
    pace = Pace(1.0, 0.5, 1.0) if short else Pace(10.0, 1.0, 3.0)
    run = Run()
    async with running_model() as model, running_relay(model) as relay:
        path = f"/{pace.tokens}/{RATE}/v1"
        url = f"http://127.0.0.1:{model.port}"
        async with running_desk("llm-chunk", url + path) as desk, running_bot(url + path) as bot:
            for number in range(rounds):
                run.note("paced desk", *await paced(desk, DeskVisitor, number, pace))
                run.note("paced bare", *await paced(bot, BotVisitor, number, pace))
                reader = partial(ModelReader, f"{path}/chat/completions")
                run.note("paced relay", *await paced(relay, reader, number, pace))
        url += f"/{burst_tokens}/0/v1"
        async with running_desk("llm-chunk", url) as desk, running_bot(url) as bot:
            for number in range(rounds + 1):
                for name, server, kind in (("burst desk", desk, DeskVisitor), ("burst bare", bot, BotVisitor)):
                    found = await burst(server, kind, f"burst{number}", burst_tokens, asks if number else 1)
                    if number:  # the first round warms up
                        run.note(name, *found)
    return [
        *run.compare("paced", f"at {RATE}/s in {STREAMS} streams"),
        Figure("the same by a relay that only copies", median(run.costs["paced relay"]), "µs of CPU"),
        *run.compare("burst", "in a burst"),
        *(Figure(kind, run.faults[kind], at_most=0) for kind in FAULTS),
    ]


class Run:
    """What was found so far: CPU a chunk in µs, and what was wrong."""

    def __init__(self) -> None:
        self.costs: defaultdict[str, list[float]] = defaultdict(list)
        self.faults: Counter[str] = Counter()

    def note(self, name: str, cost: float, faults: Counter[str]) -> None:
        self.costs[name].append(cost)
        self.faults += faults

    def compare(self, mode: str, words: str) -> list[Figure]:
        desk, bare = median(self.costs[f"{mode} desk"]), median(self.costs[f"{mode} bare"])
        return [
            Figure(f"a chunk {words}", desk, "µs of CPU", at_most=MOST_US),
            Figure(f"create(stream=True), a chunk {words}", bare, "µs of CPU"),
            Figure(f"the one beside the other, {words}", bare / desk, "times", at_least=LEAST_TIMES),
        ]


async def seated(server: Server, kind: Kind, name: str, number: int) -> list[Visitor]:
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


async def paced(server: Server, kind: Kind, number: int, pace: Pace) -> tuple[float, Counter[str]]:
    """CPU a chunk in µs while all streams are in their middle, and what was wrong."""
    visitors = await seated(server, kind, f"paced{number}", STREAMS)
    idle = await idle_cores(server, pace.idle_s)
    with hold_gc():
        for visitor in visitors:  # not in step: each chunk comes alone
            visitor.ask()
            await asyncio.sleep(pace.ramp_s / STREAMS)
        await wait_first(visitors, 30.0)
        cpu_s, heard = server.usage().cpu_s, tokens_of(visitors)
        await asyncio.sleep(pace.counted_s)
        cpu_s, heard = server.usage().cpu_s - cpu_s, tokens_of(visitors) - heard
        await wait_for(visitors, 30.0)
    for visitor in visitors:
        visitor.leave()
    return (cpu_s - idle * pace.counted_s) / max(1, heard) * 1e6, faults_of(visitors, pace.tokens)


async def burst(server: Server, kind: Kind, name: str, tokens: int, asks: int) -> tuple[float, Counter[str]]:
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
    return cpu_s / max(1, tokens_of(visitors)) * 1e6, faults_of(visitors, tokens)


if __name__ == "__main__":
    run_main(measure)
