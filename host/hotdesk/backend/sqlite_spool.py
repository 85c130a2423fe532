"""Messages on this machine's disk that are not in the journal yet: one SQLite file a worker, in `DATA/spool`.

Owns the file, the lock that says whose it is, and how much is in it. What becomes of the messages is the chat room's.
A file outlives its worker; whoever can lock it then may have it.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hotdesk_sdk import Message

from ..errors import BackendError
from .lock import FileLock
from .sqlite_writer import GroupWriter, connect, explain

__all__ = ["SpoolFile", "SpoolRow", "SpoolTaken", "find_spools"]

ROW_BYTES = 100
"""What a row costs beside the texts in it, counted generously."""

VERSION = 1

SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE spooled (
    number INTEGER PRIMARY KEY,
    conversation TEXT NOT NULL,
    id TEXT NOT NULL,
    channel TEXT NOT NULL,
    locale TEXT,
    door TEXT NOT NULL,
    body BLOB NOT NULL
);
PRAGMA user_version={VERSION};
COMMIT;
"""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Message).decode


class SpoolRow(msgspec.Struct, frozen=True):
    """What has to be known of a message without reading it."""

    number: int
    conversation: str
    id: str
    channel: str
    locale: str | None
    door: str
    size: int


class SpoolTaken(BackendError):
    """A spool that a living worker works with, or that is gone."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"the spool {path} is another worker's ({holder})")


def find_spools(folder: Path) -> list[Path]:
    """The spools there, whoever has them; none where there is no folder."""
    return sorted(folder.glob("*.db"))


class SpoolFile:
    """One spool, held by this process from `open` to `aclose`.

    Every future raises `BackendUnavailable` when nothing was done. What is asked for first is done first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"spool {path}"
        self.found: tuple[SpoolRow, ...] = ()
        """What was in it when it was opened, in order."""

        self.rows = 0
        self.bytes = 0
        """How much is in it, or on its way; see `put`."""

        self._lock = FileLock(Path(f"{path}.lock"))
        self._numbers = itertools.count(1)
        self._db: sqlite3.Connection
        self._writer = GroupWriter[sqlite3.Connection](
            self.url, str(path), name="hotdesk-spool", on_group=lambda writes, took, failed: None
        )

    @classmethod
    async def open(cls, path: Path, *, new: bool) -> SpoolFile:
        """Open the spool at *path*; it is made unless it is there, or *new* is False.

        Raises `SpoolTaken`, and `BackendError` when it can't be used.
        """
        spool = cls(path)
        try:
            await asyncio.to_thread(spool._open, new)
        except (sqlite3.Error, OSError) as exc:
            raise BackendError(f"{spool.url}: {explain(exc)}") from exc
        spool._writer.start(spool._transact)
        return spool

    def _open(self, new: bool) -> None:
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(lambda holder: SpoolTaken(self.path, holder))
        db: sqlite3.Connection | None = None
        try:
            if not new and not self.path.exists():  # its holder, who emptied and removed it, was quicker
                self._remove_lock()
                raise SpoolTaken(self.path, "it is gone")
            db = connect(str(self.path), cache_kib=8192)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise BackendError(f"{self.url}: it is of version {version}, this hotdesk knows {VERSION}")
            if not version:
                db.executescript(SCHEMA)
            size = f"{ROW_BYTES} + length(body) + length(conversation) + length(id)"
            columns = f"number, conversation, id, channel, locale, door, {size}"
            found = db.execute(f"SELECT {columns} FROM spooled ORDER BY number")
            self.found = tuple(SpoolRow(*row) for row in found)
        except BaseException:
            if db is not None:
                db.close()
            self._lock.release()
            raise
        self.rows = len(self.found)
        self.bytes = sum(row.size for row in self.found)
        self._numbers = itertools.count(self.found[-1].number + 1 if self.found else 1)
        self._db = db

    def _transact(self, works: Sequence[Callable[[sqlite3.Connection], Any]]) -> list[Any]:
        db = self._db
        if db.in_transaction:  # the rollback before failed too
            db.execute("ROLLBACK")
        db.execute("BEGIN IMMEDIATE")
        try:
            results = [work(db) for work in works]
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return results

    def put(
        self, message: Message, *, channel: str, locale: str | None, door: str
    ) -> tuple[SpoolRow, asyncio.Future[None]]:
        """Keep *message* behind all others; on disk when the future resolves. Counted in `rows` and `bytes` at once."""
        body = _encode(message)
        size = ROW_BYTES + len(body) + len(message.conversation) + len(message.id)
        row = SpoolRow(next(self._numbers), message.conversation, message.id, channel, locale, door, size)
        values = (row.number, row.conversation, row.id, channel, locale, door, body)
        self.rows += 1
        self.bytes += size

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO spooled VALUES (?, ?, ?, ?, ?, ?, ?)", values)

        future = self._writer.submit(work)

        def put(done: asyncio.Future[None]) -> None:
            if done.cancelled() or done.exception() is not None:
                self._uncount(size)

        future.add_done_callback(put)
        return row, future

    def read(self, rows: Sequence[SpoolRow]) -> asyncio.Future[list[Message]]:
        """Messages that are here, in the order of *rows*."""

        def work(db: sqlite3.Connection) -> list[Message]:
            marks = ",".join("?" * len(rows))
            numbers = tuple(row.number for row in rows)
            found = dict(db.execute(f"SELECT number, body FROM spooled WHERE number IN ({marks})", numbers))
            return [_decode(found[number]) for number in numbers]

        return self._writer.submit(work)

    def delete(self, row: SpoolRow) -> asyncio.Future[None]:
        """Forget a message: it is in the journal now."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM spooled WHERE number = ?", (row.number,))

        future = self._writer.submit(work)

        def deleted(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._uncount(row.size)

        future.add_done_callback(deleted)
        return future

    def _uncount(self, size: int) -> None:
        self.rows -= 1
        self.bytes -= size

    async def aclose(self) -> None:
        """Let it go; an empty one is removed."""
        await self._writer.aclose()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        left = True
        try:
            left = self._db.execute("SELECT 1 FROM spooled LIMIT 1").fetchone() is not None
        except sqlite3.Error:
            pass  # what can't be read is not removed
        self._db.close()
        if not left:
            for end in ("", "-wal", "-shm"):
                Path(f"{self.path}{end}").unlink(missing_ok=True)
            self._remove_lock()
        self._lock.release()

    def _remove_lock(self) -> None:
        """After the spool, and held to the end: who opened it before finds that there is no spool any more."""
        Path(f"{self.path}.lock").unlink(missing_ok=True)
