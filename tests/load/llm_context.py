"""How long it takes to read a conversation's context and to make a prompt of it, of 12 entries and of 60.

Cold, it comes from SQLite: the conversation was not looked at since the host started. Warm, it comes from memory, as
for every further turn. Beside them, in the same run and from the same file, `sqlite3` alone: the query and its rows,
with no thread to hand over to, nothing decoded and no prompt made.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter

import msgspec
from prometheus_client import CollectorRegistry
from tests.load.client import percentile
from tests.load.hosts import work_folder
from tests.load.llm_bare import ANSWER, SYSTEM, TEXT
from tests.load.report import Figure, run_main

from hotdesk.backend import StoredReply, open_backend
from hotdesk.backend.sqlite_schema import migrate
from hotdesk.chat.prompt import build_prompt, in_turn_order
from hotdesk.chat.recent import ENTRIES, NEWEST, Recent
from hotdesk.metrics import Metrics
from hotdesk_sdk import Attachment, Message

__all__ = ["measure"]

MOST_MS = 0.3
BUDGET = 4_000
QUERY = """SELECT kind, seq, body FROM journal WHERE conversation = (SELECT id FROM conversations WHERE name = ?)
AND seq < ? ORDER BY seq DESC LIMIT ?"""


async def measure(short: bool) -> list[Figure]:
    """One conversation after the other, in no order: bare, cold, warm."""
    conversations = 300 if short else 3_000
    figures: list[Figure] = []
    for entries in (12, 60):
        names = [f"c{number}" for number in range(conversations)]
        random.shuffle(names)
        with work_folder("llm-context") as folder:
            path = folder / "hotdesk.db"
            await asyncio.to_thread(fill, path, conversations, entries)
            bare = bare_reads(path, names)
            backend = await open_backend(f"sqlite:///{path}", Metrics(CollectorRegistry()))
            try:
                recent, broken = Recent(backend), 0

                async def read(name: str, recent: Recent = recent, entries: int = entries) -> bool:
                    return await read_prompt(recent, name) == entries + 2

                for name in names[:50]:  # the code's first calls, with a memory that is thrown away
                    broken += not await read(name)
                recent.forget_all()
                cold, wrong = await timed(read, names)
                warm, wrong_again = await timed(read, names)
            finally:
                await backend.aclose()
        figures += [
            Figure(f"{entries} entries, from memory, p50", percentile(warm, 50), "ms"),
            Figure(f"{entries} entries, from memory, p99", percentile(warm, 99), "ms", at_most=MOST_MS),
            Figure(f"{entries} entries, from SQLite, p50", percentile(cold, 50), "ms"),
            Figure(f"{entries} entries, from SQLite, p99", percentile(cold, 99), "ms", at_most=MOST_MS),
            Figure(f"{entries} entries, a bare SELECT, p50", percentile(bare, 50), "ms"),
            Figure(f"{entries} entries, a bare SELECT, p99", percentile(bare, 99), "ms"),
            Figure(f"{entries} entries, prompts without all of them", broken + wrong + wrong_again, at_most=0),
        ]
    return figures


async def read_prompt(recent: Recent, conversation: str) -> int:
    """What `ctx.llm.reply` does before it asks: read, put in order, build. How many messages the prompt has."""
    before = in_turn_order(await recent.newest(conversation, ENTRIES), NEWEST)
    prompt = await build_prompt(
        before, TEXT, (), system=SYSTEM, summary="", budget=BUDGET, show=show_nothing, describe=str
    )
    return len(prompt.messages)


async def show_nothing(attachment: Attachment) -> str | None:
    return None


async def timed(read: Callable[[str], Awaitable[bool]], names: list[str]) -> tuple[list[float], int]:
    """Milliseconds of each, and how many gave something else than they should."""
    took: list[float] = []
    wrong = 0
    for name in names:
        began = perf_counter()
        right = await read(name)
        took.append((perf_counter() - began) * 1000)
        wrong += not right
    return took, wrong


def bare_reads(path: Path, names: list[str]) -> list[float]:
    """Milliseconds of the query alone, on a connection that is open."""
    db = sqlite3.connect(path)
    took: list[float] = []
    try:
        for name in names:
            began = perf_counter()
            db.execute(QUERY, (name, NEWEST, ENTRIES)).fetchall()
            took.append((perf_counter() - began) * 1000)
    finally:
        db.close()
    return took


def fill(path: Path, conversations: int, entries: int) -> None:
    """Leave in *path* so many conversations of so many entries, written turn by turn as visitors write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, isolation_level=None)
    encode, now = msgspec.json.Encoder().encode, time.time()
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        migrate(db, str(path))
        db.execute("BEGIN")
        db.executemany(
            "INSERT INTO conversations (id, name, channel, opened_at) VALUES (?, ?, '', ?)",
            [(number + 1, f"c{number}", now) for number in range(conversations)],
        )
        for seq in range(1, entries + 1, 2):
            for number in range(conversations):
                name = f"c{number}"
                message = Message(f"m{seq}", name, seq, TEXT, at=now)
                reply = StoredReply(f"r{seq}", name, seq + 1, message.id, ANSWER, "chatgpt", 1, {}, now)
                db.executemany(
                    "INSERT INTO journal (conversation, seq, kind, id, at, body) VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (number + 1, seq, 0, message.id, now, encode(message)),
                        (number + 1, seq + 1, 1, reply.id, now, encode(reply)),
                    ],
                )
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()


if __name__ == "__main__":
    run_main(measure)
