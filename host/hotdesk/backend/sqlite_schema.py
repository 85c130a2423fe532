"""The tables of the embedded journal, and the way from each earlier version to this one (`PRAGMA user_version`)."""

from __future__ import annotations

import sqlite3

from ..errors import BackendError

__all__ = ["MIGRATIONS", "migrate"]

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        channel TEXT NOT NULL,
        locale TEXT,
        assignee TEXT,
        tags BLOB,
        state BLOB,
        opened_at REAL NOT NULL,
        closed_at REAL
    );
    -- kind: 0 a message, 1 a reply. In the order of arrival, so that a commit writes few pages however many
    -- conversations it touches; clustered by conversation, long ones cost twice the CPU a turn.
    CREATE TABLE journal (
        conversation INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        kind INTEGER NOT NULL,
        id TEXT NOT NULL,
        at REAL NOT NULL,
        body BLOB NOT NULL
    );
    CREATE UNIQUE INDEX journal_seq ON journal (conversation, seq);
    CREATE UNIQUE INDEX message_ids ON journal (conversation, id) WHERE kind = 0;
    -- Turns that have not ended: few, however long the journal is, and read whole at the start.
    CREATE TABLE open_turns (
        id INTEGER PRIMARY KEY, conversation INTEGER NOT NULL, seq INTEGER NOT NULL
    );
    CREATE TABLE deliveries (
        conversation INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (conversation, seq)
    ) WITHOUT ROWID;
    CREATE TABLE kv (
        plugin TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (plugin, key)
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE open_turns ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE dead_letters (
        conversation INTEGER NOT NULL, seq INTEGER NOT NULL, tries INTEGER NOT NULL, at REAL NOT NULL,
        PRIMARY KEY (conversation, seq)
    ) WITHOUT ROWID;
    """,
)
"""Migration n takes a file from version n to n + 1. Published ones are never edited."""


def migrate(db: sqlite3.Connection, url: str) -> None:
    """Bring the file to this version, each step in one transaction. Raises `BackendError` on a newer file."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise BackendError(
            f"backend {url}: its schema is version {version}, this hotdesk knows {len(MIGRATIONS)}; use the newer one"
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version={number}; COMMIT;")
