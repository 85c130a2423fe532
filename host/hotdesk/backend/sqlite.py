"""The embedded journal: SQLite in WAL mode with `synchronous=FULL`, one writer thread, group commit.

All that arrives during one commit goes into the next. The only importer of `sqlite3`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hotdesk_sdk import Message

from ..errors import BackendError, BackendUnavailable
from ..metrics import Metrics
from . import Appended, ConversationRecord, Entry, Outcome, StoredReply, TurnEnd
from .sqlite_schema import migrate

__all__ = ["SqliteBackend"]

T = TypeVar("T")

_Write = tuple[Callable[[], Any], asyncio.Future[Any]]

GROUP = 512
"""How many writes one commit takes at the most: bounds how long the first of a burst waits for the last."""

WARM = 20_000
"""Conversations whose next seq and record are kept in memory; about 600 bytes each."""

BUSY_TIMEOUT_MS = 2_000
"""How long another program's lock on the file is waited for."""

_encode = msgspec.json.Encoder().encode
_decode_message = msgspec.json.Decoder(Message).decode
_decode_reply = msgspec.json.Decoder(StoredReply).decode
_decode_tags = msgspec.json.Decoder(tuple[str, ...]).decode
_at = float


class _Warm:
    """A conversation that the writer knows: its row, the last seq, its record."""

    __slots__ = ("last_seq", "open", "record", "row")

    def __init__(self, row: int, last_seq: int, record: ConversationRecord, open: bool) -> None:
        self.row = row
        self.last_seq = last_seq
        self.record = record
        self.open = open


class SqliteBackend:
    """See `backend.Backend` for what is promised."""

    durability = "sqlite WAL, synchronous=FULL: accepted is on disk"

    def __init__(self, path: str, metrics: Metrics) -> None:
        self.url = f"sqlite:///{path}"
        self._path = path
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._stopping = False
        self._db: sqlite3.Connection
        self._warm: dict[str, _Warm] = {}
        self._readers = concurrent.futures.ThreadPoolExecutor(2, "hotdesk-read", initializer=self._open_reader)
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._thread = threading.Thread(target=self._write, name="hotdesk-journal", daemon=True)

    @classmethod
    async def open(cls, path: str, metrics: Metrics) -> SqliteBackend:
        backend = cls(path, metrics)
        try:
            backend._db = await asyncio.to_thread(backend._connect)
        except (sqlite3.Error, OSError) as exc:
            raise BackendError(f"backend {backend.url}: {_explain(exc)}") from exc
        backend._thread.start()
        return backend

    def _connect(self) -> sqlite3.Connection:
        if sqlite3.sqlite_version_info < (3, 35):
            raise BackendError(f"SQLite is {sqlite3.sqlite_version}; hotdesk needs 3.35 or newer")
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, cached_statements=64)
        try:
            db.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA cache_size=-65536")
            db.execute("PRAGMA wal_autocheckpoint=4000")
            migrate(db, self.url)
        except BaseException:
            db.close()
            raise
        return db

    async def aclose(self) -> None:
        """Commit what is queued, and close."""
        self._stopping = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._readers.shutdown(wait=True)
        for connection in self._opened:
            connection.close()
        self._db.close()

    # -- the writer thread -----------------------------------------------------------------------------------

    def _submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self._stopping:
            future.set_exception(BackendUnavailable(self.url, "the host is stopping"))
        else:
            self._queue.put((work, future))
        return future

    def _next_group(self) -> list[_Write]:
        """Wait for a write, and take what else has come by then; empty when it is time to stop."""
        group: list[_Write] = []
        item = self._queue.get()
        try:
            while item is not None:
                group.append(item)
                if len(group) == GROUP:
                    return group
                item = self._queue.get_nowait()
        except queue.Empty:
            return group
        if group:
            self._queue.put(None)  # the call to stop, for when these are on disk
        return group

    def _write(self) -> None:
        while group := self._next_group():
            started = time.perf_counter()
            results = self._commit(group)
            took = time.perf_counter() - started
            try:
                self._loop.call_soon_threadsafe(self._settle, group, results, took)
            except RuntimeError:
                return  # the loop is gone: nobody waits

    def _commit(self, group: list[_Write]) -> list[Any]:
        """One transaction for all; if that fails, one for each, so that a bad write harms nobody else's."""
        try:
            return self._transact([work for work, _ in group])
        except sqlite3.Error as exc:
            if len(group) == 1 or _is_everybodys(exc):
                failure = BackendUnavailable(self.url, _explain(exc))
                return [failure] * len(group)
        except Exception as exc:  # a fault of ours in one write must not take the writer thread with it
            if len(group) == 1:
                return [exc]
        return [result for item in group for result in self._commit([item])]

    def _transact(self, works: list[Callable[[], Any]]) -> list[Any]:
        db = self._db
        if db.in_transaction:  # the rollback before failed too
            db.execute("ROLLBACK")
        db.execute("BEGIN IMMEDIATE")
        try:
            results = [work() for work in works]
            db.execute("COMMIT")
        except BaseException:
            self._warm.clear()
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        if len(self._warm) > WARM:
            for name in list(self._warm)[: WARM // 4]:
                del self._warm[name]
        return results

    def _settle(self, group: list[_Write], results: list[Any], took: float) -> None:
        self._metrics.commits.observe(took)
        self._metrics.commit_rows.inc(len(group))
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                self._metrics.backend_errors.inc()
                future.set_exception(result)
            else:
                future.set_result(result)

    def _known(self, name: str) -> _Warm | None:
        warm = self._warm.get(name)
        if warm is None:
            row = self._db.execute(
                "SELECT id, channel, locale, assignee, tags, state, closed_at IS NULL,"
                " (SELECT coalesce(max(seq), 0) FROM journal WHERE conversation = conversations.id)"
                " FROM conversations WHERE name = ?",
                (name,),
            ).fetchone()
            if row is None:
                return None
            warm = self._warm[name] = _Warm(row[0], row[7], _record(name, row[1:6]), bool(row[6]))
        return warm

    def append(self, message: Message, *, channel: str, locale: str | None) -> asyncio.Future[Appended]:
        return self._submit(partial(self._append, message, _encode(message), channel, locale))

    def _append(self, message: Message, body: bytes, channel: str, locale: str | None) -> Appended:
        db, name = self._db, message.conversation
        warm = self._known(name)
        opened = False
        if warm is None:
            row = db.execute(
                "INSERT INTO conversations (name, channel, locale, opened_at) VALUES (?, ?, ?, ?)",
                (name, channel, locale, message.at),
            ).lastrowid
            assert row is not None
            warm = self._warm[name] = _Warm(row, 0, ConversationRecord(name, channel, locale), True)
            opened = True
        seq = warm.last_seq + 1
        try:
            db.execute(
                "INSERT INTO journal (conversation, seq, kind, id, at, body) VALUES (?, ?, 0, ?, ?, ?)",
                (warm.row, seq, message.id, message.at, body),
            )
        except sqlite3.IntegrityError:
            first = db.execute(
                "SELECT seq, at FROM journal WHERE conversation = ? AND id = ? AND kind = 0", (warm.row, message.id)
            ).fetchone()
            if first is None:
                raise
            return Appended(first[0], first[1], True, False, warm.record)
        db.execute("INSERT INTO open_turns (conversation, seq) VALUES (?, ?)", (warm.row, seq))
        warm.last_seq = seq
        if not warm.open:
            db.execute("UPDATE conversations SET closed_at = NULL WHERE id = ?", (warm.row,))
            warm.open = opened = True
        return Appended(seq, message.at, False, opened, warm.record)

    def finish(self, end: TurnEnd) -> asyncio.Future[tuple[StoredReply, ...] | None]:
        return self._submit(partial(self._finish, end))

    def _finish(self, end: TurnEnd) -> tuple[StoredReply, ...] | None:
        db = self._db
        warm = self._known(end.conversation)
        if warm is None:
            return None
        ended = db.execute("DELETE FROM open_turns WHERE conversation = ? AND seq = ?", (warm.row, end.seq))
        if ended.rowcount == 0:
            return None
        stored = tuple(self._insert_reply(warm, reply, end.deliver) for reply in end.replies)
        if end.changed is not None:
            self._change(warm, end.changed, end.closed)
        return stored

    def _insert_reply(self, warm: _Warm, reply: StoredReply, deliver: bool) -> StoredReply:
        seq = warm.last_seq + 1
        reply = msgspec.structs.replace(reply, seq=seq)
        self._db.execute(
            "INSERT INTO journal (conversation, seq, kind, id, at, body) VALUES (?, ?, 1, ?, ?, ?)",
            (warm.row, seq, reply.id, reply.at, _encode(reply)),
        )
        if deliver:
            self._db.execute("INSERT INTO deliveries (conversation, seq) VALUES (?, ?)", (warm.row, seq))
        warm.last_seq = seq
        return reply

    def _change(self, warm: _Warm, changed: ConversationRecord, closed: bool) -> None:
        if closed:
            changed = ConversationRecord(changed.id, changed.channel, changed.locale)
        self._db.execute(
            "UPDATE conversations SET locale = ?, assignee = ?, tags = ?, state = ?, closed_at = ? WHERE id = ?",
            (
                changed.locale,
                changed.assignee,
                _encode(changed.tags),
                changed.state,
                time.time() if closed else None,
                warm.row,
            ),
        )
        warm.record, warm.open = changed, not closed

    def post(self, reply: StoredReply, *, deliver: bool) -> asyncio.Future[StoredReply | None]:
        def work() -> StoredReply | None:
            warm = self._known(reply.conversation)
            return None if warm is None else self._insert_reply(warm, reply, deliver)

        return self._submit(work)

    def delivered(self, conversation: str, seq: int) -> asyncio.Future[None]:
        def work() -> None:
            warm = self._known(conversation)
            if warm is not None:
                self._db.execute("DELETE FROM deliveries WHERE conversation = ? AND seq = ?", (warm.row, seq))

        return self._submit(work)

    async def purge(self, before: float) -> int:
        deleted, last = 0, 0
        while True:
            count, last = await self._submit(partial(self._purge_some, before, last))
            deleted += count
            if not last:
                return deleted

    def _purge_some(self, before: float, after: int) -> tuple[int, int]:
        db = self._db
        rows = db.execute(
            "SELECT id, name, (SELECT at FROM journal WHERE conversation = c.id ORDER BY seq DESC LIMIT 1),"
            " EXISTS (SELECT 1 FROM open_turns WHERE conversation = c.id)"
            " FROM conversations AS c WHERE id > ? ORDER BY id LIMIT 200",
            (after,),
        ).fetchall()
        count = 0
        for row, name, newest, busy in rows:
            if busy or (newest is not None and newest >= before):
                continue
            for table in ("journal", "deliveries"):
                db.execute(f"DELETE FROM {table} WHERE conversation = ?", (row,))
            db.execute("DELETE FROM conversations WHERE id = ?", (row,))
            self._warm.pop(name, None)
            count += 1
        return count, rows[-1][0] if rows else 0

    async def ping(self) -> None:
        def work() -> None:
            self._db.execute(
                "INSERT INTO kv (plugin, key, value) VALUES ('', 'ping', x'') ON CONFLICT DO UPDATE SET value = x''"
            )

        await self._submit(work)

    async def kv_set(self, plugin: str, key: str, value: bytes | None) -> None:
        def work() -> None:
            if value is None:
                self._db.execute("DELETE FROM kv WHERE plugin = ? AND key = ?", (plugin, key))
            else:
                self._db.execute(
                    "INSERT INTO kv (plugin, key, value) VALUES (?, ?, ?)"
                    " ON CONFLICT (plugin, key) DO UPDATE SET value = excluded.value",
                    (plugin, key, value),
                )

        await self._submit(work)

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
            raise BackendUnavailable(self.url, _explain(exc)) from exc

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
            return None if row is None else _record(conversation, row)

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
            return [(_entry(*row[:3]), _record(row[3], row[4:])) for row in rows]

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


def _record(name: str, row: tuple[Any, ...]) -> ConversationRecord:
    channel, locale, assignee, tags, state = row
    return ConversationRecord(name, channel, locale, assignee, _decode_tags(tags) if tags else (), state or b"{}")


def _entry(kind: int, seq: int, body: bytes) -> Entry:
    entry: Entry = _decode_reply(body) if kind else _decode_message(body)
    if entry.seq != seq:
        msgspec.structs.force_setattr(entry, "seq", seq)
    return entry


def _is_everybodys(exc: sqlite3.Error) -> bool:
    """Whether a failure concerns the file and not one write in it."""
    return isinstance(exc, sqlite3.OperationalError) or type(exc) is sqlite3.DatabaseError


def _explain(exc: BaseException) -> str:
    """The failure in words that say what to do."""
    text = str(exc)
    for sign, remedy in (
        ("database or disk is full", "free some disk space; nothing of the message was kept"),
        ("is locked", "another program holds a lock on the file; close it"),
        ("file is not a database", "the file is damaged or no journal; move it away or restore a backup"),
        ("malformed", "the file is damaged; restore a backup, or try `sqlite3 FILE .recover`"),
        ("readonly", "the file or its folder can't be written; mend its permissions"),
        ("unable to open", "the file or its folder can't be opened; mend its path or permissions"),
        ("disk I/O error", "the disk failed a write or read; look at the system's log"),
    ):
        if sign in text:
            return f"{text}: {remedy}"
    return text or type(exc).__name__
