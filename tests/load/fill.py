"""Fills a journal directly: a million conversations of one turn each, in the host's own tables and form."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import msgspec

from hotdesk.backend import StoredReply
from hotdesk.backend.sqlite_schema import migrate
from hotdesk_sdk import Message

__all__ = ["fill_journal"]


def fill_journal(path: Path, conversations: int) -> None:
    """Leave in *path* the conversations `c0` and on, each with a message and its reply. The file must be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        migrate(db, str(path))
        now, encode = time.time(), msgspec.json.Encoder().encode
        db.execute("BEGIN")
        for number in range(conversations):
            name = f"c{number}"
            message = Message(f"fill-{number}", name, 1, "a refund, please", at=now)
            reply = StoredReply(f"r{number}", name, 2, message.id, "It takes three days.", "faq", 1, {}, now)
            db.execute(
                "INSERT INTO conversations (id, name, channel, opened_at) VALUES (?, ?, '', ?)", (number + 1, name, now)
            )
            db.executemany(
                "INSERT INTO journal (conversation, seq, kind, id, at, body) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (number + 1, 1, 0, message.id, now, encode(message)),
                    (number + 1, 2, 1, reply.id, now, encode(reply)),
                ],
            )
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()
