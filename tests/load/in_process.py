"""Turns in one process, journal on, one echo plugin: no door, no socket, so this is what the rooms inside cost.

In the same run, the floor under it: the same rows into a bare SQLite file, committed in groups of the same size.
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import time
from pathlib import Path

from tests.load.hosts import work_folder
from tests.load.report import Figure, run_main

from hotdesk.app import Host, open_host
from hotdesk.chat.intake import NewMessage
from hotdesk.config import Config
from hotdesk.logs import configure_logs

__all__ = ["measure"]

AT_ONCE = 32
ECHO = "from hotdesk_sdk import hookimpl\n\n@hookimpl\nasync def respond(turn):\n    return turn.text\n"


async def measure(short: bool) -> list[Figure]:
    """Rounds of turns, the median of each figure; the host is warm before the first is counted."""
    turns, rounds = (3_000, 3) if short else (40_000, 5)
    configure_logs("json", "error")
    with work_folder("in-process") as folder:
        plugins = folder / "plugins"
        plugins.mkdir(exist_ok=True)
        (plugins / "echo.py").write_text(ECHO)
        bare = _bare_rows(folder / "bare.db", turns)
        async with open_host(Config(plugins=(str(plugins),), data=str(folder / "data")), serve=False) as host:
            await _turns(host, turns // 4)
            rows = sorted([await _turns(host, turns) for _ in range(rounds)])
    rate, cpu_us = rows[len(rows) // 2][0], sorted(row[1] for row in rows)[len(rows) // 2]
    return [
        Figure("turns in process, 32 at once", rate, "turns/s", at_least=8_000),
        Figure("CPU of a turn", cpu_us, "µs", at_most=120),
        Figure("bare SQLite, the same two rows in groups of 32", bare, "turns/s"),
    ]


async def _turns(host: Host, count: int) -> tuple[float, float]:
    """Turns a second, and the process's CPU a turn in µs."""

    async def one_after_the_other(lane: int) -> None:
        for number in range(count // AT_ONCE):
            accepted = await host.intake.accept(NewMessage(f"c{lane}-{number % 20}", "hello there"), door="bench")
            assert accepted.turn is not None
            await accepted.turn.wait_ended()

    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    await asyncio.gather(*(one_after_the_other(lane) for lane in range(AT_ONCE)))
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return count / took, cpu / count * 1e6


def _bare_rows(path: Path, turns: int) -> float:
    """What SQLite alone does with a message row and a reply row a turn, each group its own commit."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE rows (c INTEGER, seq INTEGER, body BLOB, PRIMARY KEY (c, seq)) WITHOUT ROWID")
    body = b"x" * 200
    began = time.perf_counter()
    for group in range(turns // AT_ONCE):
        for half in range(2):
            db.execute("BEGIN IMMEDIATE")
            for lane in range(AT_ONCE):
                db.execute("INSERT INTO rows VALUES (?, ?, ?)", (lane, group * 2 + half, body))
            db.execute("COMMIT")
    took = time.perf_counter() - began
    db.close()
    return turns / took


if __name__ == "__main__":
    run_main(measure)
