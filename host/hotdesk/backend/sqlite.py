"""The embedded journal: SQLite in WAL mode with `synchronous=FULL`, one writer thread, group commit.

All that arrives during one commit goes into the next. The only importer of `sqlite3`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hotdesk_sdk import Message

from ..errors import BackendError, BackendUnavailable
from ..metrics import Metrics
from . import Appended, ConversationRecord, DeadLetter, Entry, Listener, Outcome, StoredReply, TurnEnd
from .lock import FileLock
from .sqlite_journal import Append, Journal, record_of
from .sqlite_schema import migrate
from .sqlite_writer import BUSY_TIMEOUT_MS, GroupWriter, connect, explain

__all__ = ["SqliteBackend"]

T = TypeVar("T")

PING_BYTES = 16 * 1024
"""What a ping writes, ever other bytes, for SQLite skips a page that stays the same: a full disk is not ready."""

_decode_message = msgspec.json.Decoder(Message).decode
_decode_reply = msgspec.json.Decoder(StoredReply).decode


class SqliteBackend:
    """See `backend.Backend` for what is promised."""

    durability = "sqlite WAL, synchronous=FULL: accepted is on disk"
    warnings: tuple[str, ...] = ()
    shelf = None
    alone = True

    def __init__(self, path: str, metrics: Metrics) -> None:
        self.url = f"sqlite:///{path}"
        self._path = path
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._listener: Listener | None = None
        self._lock = FileLock(Path(f"{os.path.realpath(path)}.lock"))
        self._db: sqlite3.Connection
        self._journal: Journal
        self._readers = concurrent.futures.ThreadPoolExecutor(2, "hotdesk-read", initializer=self._open_reader)
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._writer = GroupWriter[Journal](self.url, path, name="hotdesk-journal", on_group=self._count)

    @classmethod
    async def open(cls, path: str, metrics: Metrics) -> SqliteBackend:
        backend = cls(path, metrics)
        try:
            backend._db = await asyncio.to_thread(backend._connect)
            backend._journal = await asyncio.to_thread(Journal, backend._db)
        except (sqlite3.Error, OSError) as exc:
            raise BackendError(f"backend {backend.url}: {explain(exc)}") from exc
        backend._writer.start(backend._journal.transact)
        return backend

    def _connect(self) -> sqlite3.Connection:
        if sqlite3.sqlite_version_info < (3, 35):
            raise BackendError(f"SQLite is {sqlite3.sqlite_version}; hotdesk needs 3.35 or newer")
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(lambda holder: BackendError(f"backend {self.url}: another hotdesk has it open ({holder})"))
        db: sqlite3.Connection | None = None
        try:
            db = connect(self._path, cache_kib=65536)
            migrate(db, self.url)
        except BaseException:
            if db is not None:
                db.close()
            self._lock.release()
            raise
        return db

    async def aclose(self) -> None:
        """Commit what is queued, and close."""
        if self._listener is not None and not self._stopping:
            clean = self._submit(lambda journal: journal.put("", "clean", b"1"))
            clean.add_done_callback(lambda done: done.exception())
        self._stopping = True
        await self._writer.aclose()
        self._readers.shutdown(wait=True)
        for connection in self._opened:
            connection.close()
        self._db.close()
        self._lock.release()

    # -- writes ----------------------------------------------------------------------------------------------

    def _submit(self, work: Callable[[Journal], T]) -> asyncio.Future[T]:
        return self._writer.submit(work)

    def _count(self, writes: int, took: float, failed: int) -> None:
        self._metrics.commits.observe(took)
        self._metrics.commit_rows.inc(writes)
        if failed:
            self._metrics.backend_errors.inc(failed)

    async def start(self, listener: Listener) -> int:
        self._listener = listener
        crashed = await self.kv_get("", "clean") is None
        if crashed:
            await self._submit(Journal.count_crash)
        await self.kv_set("", "clean", None)
        tries = await self._tries()
        unfinished = await self.unfinished()
        for message, record in unfinished:
            tried = tries.get((message.conversation, message.seq), 0)
            listener.run(message, record, attempt=max(2, tried + 1), opened=False, fence=None)
        for reply, record in await self.undelivered():
            listener.redeliver(reply, record)
        return len(unfinished)

    async def _tries(self) -> dict[tuple[str, int], int]:
        def work(db: sqlite3.Connection) -> dict[tuple[str, int], int]:
            rows = db.execute(
                "SELECT c.name, t.seq, t.tries FROM open_turns AS t JOIN conversations AS c ON c.id = t.conversation"
                " WHERE t.tries > 0"
            )
            return {(name, seq): tries for name, seq, tries in rows}

        return await self._reading(work)

    def count_try(self, conversation: str, seq: int, fence: Any) -> asyncio.Future[None]:
        return self._submit(lambda journal: journal.count_try(conversation, seq))

    async def dead_letters(self) -> list[DeadLetter]:
        def work(db: sqlite3.Connection) -> list[DeadLetter]:
            rows = db.execute(
                "SELECT c.name, d.seq, j.id, d.tries, d.at FROM dead_letters AS d"
                " JOIN conversations AS c ON c.id = d.conversation"
                " JOIN journal AS j ON j.conversation = d.conversation AND j.seq = d.seq ORDER BY d.at, c.name, d.seq"
            )
            return [DeadLetter(*row) for row in rows]

        return await self._reading(work)

    async def requeue(self, conversation: str, seq: int) -> bool:
        if not await self._submit(lambda journal: journal.requeue(conversation, seq)):
            return False
        entries = await self.read(conversation, seq - 1, 1)
        record = await self.record(conversation)
        if entries and isinstance(entries[0], Message) and record is not None and self._listener is not None:
            self._listener.run(entries[0], record, attempt=1, opened=False, fence=None)
        return True

    def owns(self, conversation: str) -> bool:
        return True

    def home(self, conversation: str) -> int | None:
        return os.getpid()

    def follow(self, conversation: str, on: bool) -> None:
        pass  # whoever could say something says it here

    def tell_chunks(self, fence: Any, conversation: str, to: str, index: int, texts: list[str]) -> None:
        pass

    async def listened_elsewhere(self, conversation: str) -> bool:
        return False

    async def signal(self, conversation: str, signal: str, message: str) -> bool:
        return False

    async def hand_over(self, timeout_s: float) -> None:
        pass

    def append(
        self, message: Message, *, channel: str, locale: str | None, given: bool = True, chunks: bool = False
    ) -> asyncio.Future[Appended]:
        return self._submit(Append(message, channel, locale, given))

    def finish(self, end: TurnEnd) -> asyncio.Future[tuple[StoredReply, ...] | None]:
        return self._submit(lambda journal: journal.finish(end))

    def post(self, reply: StoredReply, *, deliver: bool) -> asyncio.Future[StoredReply | None]:
        return self._submit(lambda journal: journal.post(reply, deliver))

    def delivered(self, conversation: str, seq: int) -> asyncio.Future[None]:
        return self._submit(lambda journal: journal.delivered(conversation, seq))

    async def purge(self, before: float) -> int:
        deleted, last = 0, 0
        while True:
            count, last = await self._submit(partial(Journal.purge_some, before=before, after=last))
            deleted += count
            if not last:
                return deleted

    async def ping(self) -> None:
        await self._submit(lambda journal: journal.put("", "ping", os.urandom(PING_BYTES)))

    async def kv_set(self, plugin: str, key: str, value: bytes | None) -> None:
        await self._submit(lambda journal: journal.put(plugin, key, value))

    # -- readers ---------------------------------------------------------------------------------------------

    def _open_reader(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        db.execute("PRAGMA query_only=ON")
        self._local.db = db
        self._opened.append(db)

    async def _reading(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            return work(self._local.db)

        try:
            return await self._loop.run_in_executor(self._readers, run)
        except msgspec.DecodeError as exc:
            raise BackendUnavailable(self.url, f"a row is damaged ({exc}); restore a backup of the file") from exc
        except (sqlite3.Error, concurrent.futures.BrokenExecutor, RuntimeError) as exc:
            raise BackendUnavailable(self.url, explain(exc)) from exc

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry] | None:
        def work(db: sqlite3.Connection) -> list[Entry] | None:
            found = db.execute("SELECT id FROM conversations WHERE name = ?", (conversation,)).fetchone()
            if found is None:
                return None
            rows = db.execute(
                "SELECT kind, seq, body FROM journal WHERE conversation = ? AND seq > ? ORDER BY seq LIMIT ?",
                (found[0], after, limit),
            )
            return [_entry(*row) for row in rows]

        return await self._reading(work)

    async def history(self, conversation: str, before: int, limit: int) -> list[Entry]:
        def work(db: sqlite3.Connection) -> list[Entry]:
            rows = db.execute(
                "SELECT kind, seq, body FROM journal WHERE conversation = (SELECT id FROM conversations WHERE name = ?)"
                " AND seq < ? ORDER BY seq DESC LIMIT ?",
                (conversation, before, limit),
            ).fetchall()
            return [_entry(*row) for row in reversed(rows)]

        return await self._reading(work)

    async def outcome(self, conversation: str, seq: int, message_id: str) -> Outcome:
        def work(db: sqlite3.Connection) -> Outcome:
            row = db.execute("SELECT id FROM conversations WHERE name = ?", (conversation,)).fetchone()
            if row is None:
                return Outcome(True, ())
            is_open = db.execute(
                "SELECT 1 FROM open_turns WHERE conversation = ? AND seq = ?", (row[0], seq)
            ).fetchone()
            if is_open:
                return Outcome(False, ())
            replies = db.execute(
                "SELECT seq, body FROM journal WHERE conversation = ? AND seq > ? AND kind = 1"
                " AND json_extract(CAST(body AS TEXT), '$.to') = ? ORDER BY seq",
                (row[0], seq, message_id),
            )
            return Outcome(True, tuple(msgspec.structs.replace(_decode_reply(body), seq=n) for n, body in replies))

        return await self._reading(work)

    async def record(self, conversation: str) -> ConversationRecord | None:
        def work(db: sqlite3.Connection) -> ConversationRecord | None:
            row = db.execute(
                "SELECT channel, locale, assignee, tags, state FROM conversations WHERE name = ?", (conversation,)
            ).fetchone()
            return None if row is None else record_of(conversation, row)

        return await self._reading(work)

    async def unfinished(self) -> list[tuple[Message, ConversationRecord]]:
        return [(entry, record) for entry, record in await self._listed("open_turns") if isinstance(entry, Message)]

    async def undelivered(self) -> list[tuple[StoredReply, ConversationRecord]]:
        return [(entry, record) for entry, record in await self._listed("deliveries") if isinstance(entry, StoredReply)]

    async def _listed(self, table: str) -> list[tuple[Entry, ConversationRecord]]:
        def work(db: sqlite3.Connection) -> list[tuple[Entry, ConversationRecord]]:
            rows = db.execute(
                "SELECT j.kind, j.seq, j.body, c.name, c.channel, c.locale, c.assignee, c.tags, c.state"
                f" FROM {table} AS t JOIN journal AS j ON j.conversation = t.conversation AND j.seq = t.seq"
                " JOIN conversations AS c ON c.id = t.conversation ORDER BY t.conversation, t.seq"
            )
            return [(_entry(*row[:3]), record_of(row[3], row[4:])) for row in rows]

        return await self._reading(work)

    async def kv_get(self, plugin: str, key: str) -> bytes | None:
        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute("SELECT value FROM kv WHERE plugin = ? AND key = ?", (plugin, key)).fetchone()
            return None if row is None else row[0]

        return await self._reading(work)

    async def kv_keys(self, plugin: str, prefix: str) -> list[str]:
        def work(db: sqlite3.Connection) -> list[str]:
            rows = db.execute(
                "SELECT key FROM kv WHERE plugin = ? AND substr(key, 1, ?) = ? ORDER BY key",
                (plugin, len(prefix), prefix),
            )
            return [key for (key,) in rows]

        return await self._reading(work)


def _entry(kind: int, seq: int, body: bytes) -> Entry:
    entry: Entry = _decode_reply(body) if kind else _decode_message(body)
    if entry.seq != seq:
        msgspec.structs.force_setattr(entry, "seq", seq)
    return entry
