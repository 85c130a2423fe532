"""What the desk adds to a model's stream: 500 streams at 20 tokens a second, and when each token reaches its visitor.

The model server writes the time into each token as it writes it; all processes share that clock. A token's delay is
the way from there to the visitor's WebSocket; the answer's delay to the first token has the way in as well, where the
message is committed to disk. A gap's excess is how much longer it was for the visitor than for the model server. The
same streams read straight from the model server, by the same code, show how late the run itself is on this machine.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack

from tests.load.client import hold_gc, percentile
from tests.load.hosts import Server
from tests.load.llm_servers import running_desk, running_model
from tests.load.llm_visitors import FAULTS, DeskVisitor, Heard, ModelReader, Visitor, faults_of, wait_for
from tests.load.report import Figure, run_main

__all__ = ["measure"]

RATE = 20
P50_MS, P99_MS, GAP_MS = 2.0, 15.0, 50.0


async def measure(short: bool) -> list[Figure]:
    """The control first, then the desk. Every visitor asks again when it was answered."""
    streams, answers, tokens = (100, 1, 40) if short else (500, 4, 100)
    path = f"/{tokens}/{RATE}/v1"
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(running_model())
        desk = await stack.enter_async_context(running_desk("llm-latency", f"http://127.0.0.1:{model.port}{path}"))
        readers = [ModelReader(f"{path}/chat/completions") for _ in range(streams)]
        await listen(model, readers, answers, tokens / RATE)
        visitors = [DeskVisitor() for _ in range(streams)]
        before = desk.usage().cpu_s
        await listen(desk, visitors, answers, tokens / RATE)
        cpu_s = desk.usage().cpu_s - before
    faults: Counter[str] = faults_of(readers, tokens) + faults_of(visitors, tokens)
    own, added = Delays(readers), Delays(visitors)
    return [
        Figure("streams at once", streams),
        Figure("first token, added on its way out, p50", percentile(added.first, 50), "ms", at_most=P50_MS),
        Figure("first token, added on its way out, p99", percentile(added.first, 99), "ms", at_most=P99_MS),
        Figure("first token, added both ways, p50", percentile(added.both, 50), "ms", at_most=P50_MS),
        Figure("first token, added both ways, p99", percentile(added.both, 99), "ms", at_most=P99_MS),
        Figure("any token, p50", percentile(added.every, 50), "ms"),
        Figure("any token, p99", percentile(added.every, 99), "ms"),
        Figure("longest that a gap grew", max(added.gaps, default=math.inf), "ms", at_most=GAP_MS),
        Figure("without the desk: first token out, p50", percentile(own.first, 50), "ms"),
        Figure("without the desk: first token out, p99", percentile(own.first, 99), "ms"),
        Figure("without the desk: first token both ways, p99", percentile(own.both, 99), "ms"),
        Figure("without the desk: any token, p99", percentile(own.every, 99), "ms"),
        Figure("without the desk: longest that a gap grew", max(own.gaps, default=math.inf), "ms"),
        Figure("CPU of a chunk, turns included", cpu_s / max(1, len(added.every)) * 1e6, "µs of CPU"),
        *(Figure(kind, faults[kind], at_most=0) for kind in FAULTS),
    ]


async def listen(server: Server, visitors: Sequence[Visitor], answers: int, answer_s: float) -> None:
    """Let all ask, not in step, and then each again after each answer, which takes the model *answer_s*."""
    for number, visitor in enumerate(visitors):
        await visitor.come(server.port, f"c{number}")
    with hold_gc():
        for visitor in visitors:
            visitor.ask(more=answers - 1)
            await asyncio.sleep(answer_s / 2 / len(visitors))
        await wait_for(visitors, answers * (answer_s + 2.0) + 30.0)
    for visitor in visitors:
        visitor.leave()


class Delays:
    """Milliseconds, of all answers together."""

    def __init__(self, visitors: Sequence[Visitor]) -> None:
        self.first: list[float] = []
        self.both: list[float] = []
        self.every: list[float] = []
        self.gaps: list[float] = []
        for visitor in visitors:
            for heard in visitor.heard:
                self._add(heard)

    def _add(self, heard: Heard) -> None:
        sent_before = came_before = 0
        for came, text in zip(heard.at_ns, heard.texts, strict=True):
            for word in text.split():
                number, sent, *asked = word.split(":")
                late = (came - int(sent)) / 1e6
                self.every.append(late)
                if number == "0":
                    self.first.append(late)
                    self.both.append(late + (int(asked[0]) - heard.asked_ns) / 1e6)
                else:
                    self.gaps.append(((came - came_before) - (int(sent) - sent_before)) / 1e6)
                sent_before, came_before = int(sent), came


if __name__ == "__main__":
    run_main(measure)
