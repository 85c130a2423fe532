"""Swaps under traffic: from the rename of a plugin's file to the first answer by the new code, and what it cost.

Turns arrive at 500 a second, over many conversations, while one file with a middleware and a bot is replaced again
and again; a few streamed answers live across several swaps. A history of it all goes to the checker.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.load.checker import judge
from tests.load.client import Load, open_loop, percentile
from tests.load.desk import (
    Desk,
    Entry,
    message_request,
    note_taken,
    read_taken,
)
from tests.load.history import History, Sent
from tests.load.hosts import OUT, Server, running_host
from tests.load.report import Figure, judged, run_main
from tests.load.sources import marked
from tests.load.streams import stream_turns

__all__ = ["RATE", "STREAMS", "Traffic", "measure", "replace_file", "with_mark"]

RATE = 500
CONVERSATIONS = 250
STREAMS = 4


@dataclass(slots=True)
class Traffic:
    """One host's traffic and swaps. `awaited` says of a reply whether the newest edit made it.

    A swap that nobody sees the effect of within *unseen_s* is counted as unseen, and the next one is made.
    """

    server: Server
    texts: tuple[str, ...] = ("message",)
    unseen_s: float = 5.0
    history: History = field(default_factory=History)
    unseen: int = 0
    awaited: Callable[[Entry], bool] = bool
    seen: asyncio.Future[float] | None = None
    over: bool = False

    def send(self, n: int) -> bytes:
        conversation, id = f"c{random.randrange(CONVERSATIONS)}", f"m{n}"
        self.history.add(Sent(conversation=conversation, id=id, time=perf_counter()))
        return message_request(conversation, id, f"{self.texts[n % len(self.texts)]} {n}")

    def take(self, n: int, status: int, body: bytes) -> bool:
        now = perf_counter()
        if status not in (200, 202):
            return False
        taken = read_taken(body)
        note_taken(self.history, taken, now)
        if self.seen and not self.seen.done() and any(map(self.awaited, taken.replies)):
            self.seen.set_result(now)
        return status == 200

    async def replace(
        self, target: Path, data: bytes, awaited: Callable[[Entry], bool], *, into: list[float], how: str = "rename"
    ) -> None:
        """Change *target* to *data*, and note the seconds to the first answer of which *awaited* is true."""
        self.awaited, self.seen = awaited, asyncio.get_running_loop().create_future()
        changed = await asyncio.to_thread(replace_file, target, data, how)
        try:
            into.append(await asyncio.wait_for(self.seen, self.unseen_s) - changed)
        except TimeoutError:
            self.unseen += 1

    async def stream(self, conversation: str) -> None:
        """One streamed turn after the other, until the run is over."""
        await stream_turns(self.server.port, conversation, self.history, lambda: self.over)

    async def run(
        self, edits: Callable[[], Coroutine[Any, Any, None]], seconds: float, *, streams: int = STREAMS
    ) -> Load:
        """The traffic, the streams and the edits side by side, then the record is read back."""
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(self.stream(f"stream-{number}"))
            group.create_task(edits())
            load = await open_loop(self.server.port, self.send, self.take, rate=RATE, seconds=seconds)
            self.over = True
        desk = Desk(self.server)
        for conversation in {event.conversation: None for event in self.history.events}:
            for entry in await desk.read_record(conversation, perf_counter()):
                self.history.add(entry)
        desk.close()
        return load


def with_mark(mark: str) -> Callable[[Entry], bool]:
    """Whether a reply has *mark* among its marks."""
    return lambda reply: mark in reply.marks


async def measure(short: bool) -> list[Figure]:
    """Traffic, edits and streams side by side; then the history is judged."""
    seconds, renames, in_place = (6.0, 12, 2) if short else (210.0, 300, 20)
    edits = ["rename"] * renames + ["in place"] * in_place
    random.shuffle(edits)
    waits: dict[str, list[float]] = {"rename": [], "in place": []}
    async with running_host("swaps", {"marked.py": marked(0)}) as server:
        traffic = Traffic(server)
        target = server.plugins / "marked.py"

        async def edit() -> None:
            """All edits, each when the one before was seen to serve; the traffic lasts a little longer than they."""
            began = perf_counter()
            for number, how in enumerate(edits, start=1):
                due = began + (seconds - 1.0) * (number - random.random() / 2) / len(edits)
                await asyncio.sleep(max(0.0, due - perf_counter()))
                changed, mark = marked(number).encode(), with_mark(f"v{number}")
                await traffic.replace(target, changed, mark, into=waits[how], how=how)

        load = await traffic.run(edit, seconds)
    traffic.history.save(OUT / "swaps.jsonl")
    verdict = judge(traffic.history.events)
    renamed = waits["rename"]
    return [
        Figure("swaps seen", len(renamed) + len(waits["in place"])),
        Figure("swaps unseen", traffic.unseen, at_most=0),
        Figure("rename to first answer, p50", percentile(renamed, 50) * 1000, "ms", at_most=35),
        Figure("rename to first answer, p99", percentile(renamed, 99) * 1000, "ms", at_most=90),
        Figure("rename to first answer, max", percentile(renamed, 100) * 1000, "ms", at_most=500),
        Figure("in place to first answer, max", percentile(waits["in place"], 100) * 1000, "ms", at_most=500),
        Figure("turns", verdict.replies, at_least=None if short else 100_000),
        Figure("streams across swaps", verdict.streams),
        Figure(f"turn p50 at {RATE}/s", load.percentile_ms(50), "ms"),
        Figure(f"turn p99 at {RATE}/s", load.percentile_ms(99), "ms"),
        Figure("failed", load.failed, at_most=0),
        Figure("not accepted", verdict.unaccepted, at_most=0),
        *judged(verdict),
    ]


def replace_file(target: Path, data: bytes, how: str = "rename") -> float:
    """Change *target*, and return the time just before the change could be seen."""
    if how == "in place":
        changed = perf_counter()
        target.write_bytes(data)
        return changed
    staged = target.parent.parent / target.name
    staged.write_bytes(data)
    changed = perf_counter()
    os.replace(staged, target)
    return changed


if __name__ == "__main__":
    run_main(measure)
