"""Swaps under traffic: from the rename of a plugin's file to the first answer by the new code, and what it cost.

Turns arrive at 500 a second, over many conversations, while one file with a middleware and a bot is replaced again
and again; a few streamed answers live across several swaps. A history of it all goes to the checker.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from tests.load.checker import judge
from tests.load.client import Load, open_loop, percentile
from tests.load.desk import (
    Desk,
    message_request,
    note_taken,
    read_taken,
)
from tests.load.history import History, Sent
from tests.load.hosts import OUT, Server, running_host
from tests.load.report import Figure, judged, run_main
from tests.load.sources import marked
from tests.load.streams import stream_turns

__all__ = ["measure"]

RATE = 500
CONVERSATIONS = 250
STREAMS = 4
# A swap that nobody sees the effect of within this is counted as unseen, and the next one is made.
UNSEEN_S = 5.0


@dataclass(slots=True)
class _Run:
    """One run's traffic and edits. `awaited` is the version that the newest edit brings."""

    server: Server
    history: History = field(default_factory=History)
    waits: dict[str, list[float]] = field(default_factory=lambda: {"rename": [], "in place": []})
    unseen: int = 0
    awaited: str = ""
    seen: asyncio.Future[float] | None = None
    over: bool = False

    def send(self, n: int) -> bytes:
        conversation, id = f"c{random.randrange(CONVERSATIONS)}", f"m{n}"
        self.history.add(Sent(conversation=conversation, id=id, time=perf_counter()))
        return message_request(conversation, id, f"message {n}")

    def take(self, n: int, status: int, body: bytes) -> bool:
        now = perf_counter()
        if status not in (200, 202):
            return False
        taken = read_taken(body)
        note_taken(self.history, taken, now)
        if self.seen and not self.seen.done() and any(self.awaited in reply.marks for reply in taken.replies):
            self.seen.set_result(now)
        return status == 200

    async def edit(self, edits: list[str], seconds: float) -> None:
        """Make all *edits* within *seconds*, each when the one before was seen to serve."""
        target = self.server.plugins / "marked.py"
        began = perf_counter()
        for number, how in enumerate(edits, start=1):
            due = began + seconds * (number - random.random() / 2) / len(edits)
            await asyncio.sleep(max(0.0, due - perf_counter()))
            self.awaited, self.seen = f"v{number}", asyncio.get_running_loop().create_future()
            changed = replace_file(target, marked(number), how)
            try:
                self.waits[how].append(await asyncio.wait_for(self.seen, UNSEEN_S) - changed)
            except TimeoutError:
                self.unseen += 1

    async def stream(self, conversation: str) -> None:
        """One streamed turn after the other, until the run is over."""
        await stream_turns(self.server.port, conversation, self.history, lambda: self.over)


async def measure(short: bool) -> list[Figure]:
    """Traffic, edits and streams side by side; then the record is read back and the history judged."""
    seconds, renames, in_place = (8.0, 12, 2) if short else (210.0, 300, 20)
    edits = ["rename"] * renames + ["in place"] * in_place
    random.shuffle(edits)
    async with running_host("swaps", {"marked.py": marked(0)}) as server:
        run = _Run(server)
        load = await drive(run, edits, seconds)
        desk = Desk(server)
        for conversation in {event.conversation: None for event in run.history.events}:
            for entry in await desk.read_record(conversation, perf_counter()):
                run.history.add(entry)
        desk.close()
    run.history.save(OUT / "swaps.jsonl")
    verdict = judge(run.history.events)
    renamed = run.waits["rename"]
    return [
        Figure("swaps seen", len(renamed) + len(run.waits["in place"])),
        Figure("swaps unseen", run.unseen, at_most=0),
        Figure("rename to first answer, p50", percentile(renamed, 50) * 1000, "ms", at_most=35),
        Figure("rename to first answer, p99", percentile(renamed, 99) * 1000, "ms", at_most=90),
        Figure("rename to first answer, max", percentile(renamed, 100) * 1000, "ms", at_most=500),
        Figure("in place to first answer, max", percentile(run.waits["in place"], 100) * 1000, "ms", at_most=500),
        Figure("turns", verdict.replies, at_least=None if short else 100_000),
        Figure("streams across swaps", verdict.streams),
        Figure(f"turn p50 at {RATE}/s", load.percentile_ms(50), "ms"),
        Figure(f"turn p99 at {RATE}/s", load.percentile_ms(99), "ms"),
        Figure("failed", load.failed, at_most=0),
        Figure("not accepted", verdict.unaccepted, at_most=0),
        *judged(verdict),
    ]


async def drive(run: _Run, edits: list[str], seconds: float) -> Load:
    """The traffic lasts a little longer than the edits, so that the last one is seen too."""
    async with asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(run.stream(f"stream-{number}"))
        group.create_task(run.edit(edits, seconds - 1.0))
        load = await open_loop(run.server.port, run.send, run.take, rate=RATE, seconds=seconds)
        run.over = True
    return load


def replace_file(target: Path, source: str, how: str) -> float:
    """Change *target*, and return the time just before the change could be seen."""
    if how == "in place":
        changed = perf_counter()
        target.write_text(source)
        return changed
    staged = target.parent.parent / target.name
    staged.write_text(source)
    changed = perf_counter()
    os.replace(staged, target)
    return changed


if __name__ == "__main__":
    run_main(measure)
