"""What the writer thread does inside one transaction.

A statement gives up the interpreter's lock and has to win it back from a busy event loop, which costs more than
the statement. So a group's rows are collected first and written with few statements of many rows: one group of 27
writes took 2.7 ms with a statement a row, beside a loop under load.
"""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hotdesk_sdk import Message

from . import SUSPECT_TRIES, Appended, ConversationRecord, StoredReply, TurnEnd

__all__ = ["Journal", "record_of"]

WARM = 20_000
"""Conversations whose next seq and record are kept in memory; about 600 bytes each."""

_encode = msgspec.json.Encoder().encode
_decode_tags = msgspec.json.Decoder(tuple[str, ...]).decode

_JOURNAL = "INSERT INTO journal (conversation, seq, kind, id, at, body) VALUES "
_OPEN = "INSERT INTO open_turns (id, conversation, seq) VALUES "
_OPENED = "INSERT INTO conversations (id, name, channel, locale, opened_at) VALUES "
_CHUNKS = (128, 64, 32, 16, 8, 4, 2, 1)
"""How many rows one statement may have. Few sizes, so that each is prepared once and kept."""


class _Warm:
    """A conversation that the writer knows: its row, the last seq, its record."""

    __slots__ = ("last_seq", "open", "record", "row")

    def __init__(self, row: int, last_seq: int, record: ConversationRecord, open: bool) -> None:
        self.row = row
        self.last_seq = last_seq
        self.record = record
        self.open = open


class Journal:
    """The writer's view of the tables; nobody else writes them. Every method belongs to the writer thread."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._warm: dict[str, _Warm] = {}
        self._journal: list[tuple[Any, ...]] = []
        self._conversations: list[tuple[Any, ...]] = []
        self._ended: list[int] = []
        self._began: list[tuple[int, int, int]] = []
        self._ids: dict[tuple[int, str], tuple[int, float]] = {}
        self._open: dict[tuple[int, int], int] = {}
        self._turn_ids: itertools.count[int]
        self._conversation_ids: itertools.count[int]
        self._start_over()

    def _start_over(self) -> None:
        """Know just what the file says: at the start, and after a transaction that failed."""
        db = self._db
        self._warm.clear()
        self._forget_group()
        self._open = {
            (conversation, seq): id
            for id, conversation, seq in db.execute("SELECT id, conversation, seq FROM open_turns")
        }
        self._turn_ids = itertools.count(max(self._open.values(), default=0) + 1)
        (last,) = db.execute("SELECT coalesce(max(id), 0) FROM conversations").fetchone()
        self._conversation_ids = itertools.count(last + 1)

    def _forget_group(self) -> None:
        for rows in (self._journal, self._conversations, self._ended, self._began):
            rows.clear()
        self._ids.clear()

    def transact(self, works: Sequence[Callable[[Journal], Any]]) -> list[Any]:
        """Do all of *works* in one transaction, on disk when this returns. Raises `sqlite3.Error`: none of it was."""
        db = self._db
        if db.in_transaction:  # the rollback before failed too
            db.execute("ROLLBACK")
        db.execute("BEGIN IMMEDIATE")
        try:
            appends = [work for work in works if isinstance(work, Append)]
            if appends:
                self._look_up(appends)
            results = [work(self) for work in works]
            self.flush()
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self._start_over()
            raise
        self._ids.clear()
        if len(self._warm) > WARM:
            for name in list(self._warm)[: WARM // 4]:
                del self._warm[name]
        return results

    def flush(self) -> None:
        """Write what was collected, so that a statement of one's own sees it."""
        self._insert(_OPENED, 5, self._conversations)
        self._insert(_JOURNAL, 6, self._journal)
        self._insert(_OPEN, 3, self._began)
        start = 0
        for size in _sizes(len(self._ended)):
            marks = ",".join("?" * size)
            self._db.execute(f"DELETE FROM open_turns WHERE id IN ({marks})", self._ended[start : start + size])
            start += size
        ids = self._ids.copy()
        self._forget_group()
        self._ids = ids

    def _insert(self, statement: str, width: int, rows: list[tuple[Any, ...]] | list[tuple[int, int, int]]) -> None:
        row = "(" + ",".join("?" * width) + ")"
        start = 0
        for size in _sizes(len(rows)):
            values = list(itertools.chain.from_iterable(rows[start : start + size]))
            self._db.execute(statement + ",".join([row] * size), values)
            start += size

    def _look_up(self, appends: list[Append]) -> None:
        """Which conversations these go to, and which of their ids came before: two questions for the whole group."""
        cold = list({a.message.conversation for a in appends if a.message.conversation not in self._warm})
        start = 0
        for size in _sizes(len(cold)):
            rows = self._db.execute(_COLD + f"WHERE name IN ({','.join('?' * size)})", cold[start : start + size])
            for row in rows.fetchall():
                self._keep(row)
            start += size
        keys = [
            (warm.row, a.message.id)
            for a in appends
            if a.given and (warm := self._warm.get(a.message.conversation)) is not None and warm.last_seq
        ]
        start = 0
        for size in _sizes(len(keys)):
            asked = list(itertools.chain.from_iterable(keys[start : start + size]))
            values = ",".join(["(?,?)"] * size)
            for row, id, seq, at in self._db.execute(
                f"WITH asked(c, i) AS (VALUES {values}) SELECT c, i, seq, at FROM asked"
                " CROSS JOIN journal ON conversation = c AND id = i AND kind = 0",
                asked,
            ).fetchall():
                self._ids[(row, id)] = (seq, at)
            start += size

    def known(self, name: str) -> _Warm | None:
        """A conversation, from memory or from the file."""
        warm = self._warm.get(name)
        if warm is None:
            row = self._db.execute(_COLD + "WHERE name = ?", (name,)).fetchone()
            return None if row is None else self._keep(row)
        return warm

    def _keep(self, row: tuple[Any, ...]) -> _Warm:
        name = row[1]
        warm = self._warm[name] = _Warm(row[0], row[8], record_of(name, row[2:7]), bool(row[7]))
        return warm

    def append(self, message: Message, body: bytes, channel: str, locale: str | None) -> Appended:
        """A message, unless its id is known. `_look_up` was asked about the whole group before."""
        name = message.conversation
        warm = self._warm.get(name)
        opened = False
        if warm is None:
            row = next(self._conversation_ids)
            self._conversations.append((row, name, channel, locale, message.at))
            warm = self._warm[name] = _Warm(row, 0, ConversationRecord(name, channel, locale), True)
            opened = True
        key = (warm.row, message.id)
        if (first := self._ids.get(key)) is not None:
            return Appended(first[0], first[1], True, False, warm.record, here=False)
        seq = warm.last_seq = warm.last_seq + 1
        self._ids[key] = (seq, message.at)
        self._journal.append((warm.row, seq, 0, message.id, message.at, body))
        turn = next(self._turn_ids)
        self._open[(warm.row, seq)] = turn
        self._began.append((turn, warm.row, seq))
        if not warm.open:
            self._db.execute("UPDATE conversations SET closed_at = NULL WHERE id = ?", (warm.row,))
            warm.open = opened = True
        return Appended(seq, message.at, False, opened, warm.record)

    def finish(self, end: TurnEnd) -> tuple[StoredReply, ...] | None:
        """A turn's end; None when it had ended."""
        warm = self.known(end.conversation)
        if warm is None or (turn := self._open.pop((warm.row, end.seq), None)) is None:
            return None
        self._ended.append(turn)
        if end.tries:
            self._db.execute(
                "INSERT INTO dead_letters (conversation, seq, tries, at) VALUES (?, ?, ?, ?)",
                (warm.row, end.seq, end.tries, time.time()),
            )
        stored = tuple(self.reply(warm, reply, end.deliver) for reply in end.replies)
        if end.changed is not None:
            self._change(warm, end.changed, end.closed)
        return stored

    def count_crash(self) -> None:
        """The last process ended with turns under way: any first open turn of a conversation may have been why."""
        self._db.execute(
            "UPDATE open_turns SET tries = tries + 1 WHERE tries < ? AND seq ="
            " (SELECT min(seq) FROM open_turns AS o WHERE o.conversation = open_turns.conversation)",
            (SUSPECT_TRIES,),
        )

    def count_try(self, conversation: str, seq: int) -> None:
        """One turn is tried once more."""
        warm = self.known(conversation)
        if warm is not None and (turn := self._open.get((warm.row, seq))) is not None:
            self._db.execute("UPDATE open_turns SET tries = tries + 1 WHERE id = ?", (turn,))

    def requeue(self, conversation: str, seq: int) -> bool:
        """A dead letter's turn is open again."""
        warm = self.known(conversation)
        if warm is None:
            return False
        self.flush()
        gone = self._db.execute("DELETE FROM dead_letters WHERE conversation = ? AND seq = ?", (warm.row, seq))
        if gone.rowcount != 1:
            return False
        turn = next(self._turn_ids)
        self._open[(warm.row, seq)] = turn
        self._began.append((turn, warm.row, seq))
        return True

    def post(self, reply: StoredReply, deliver: bool) -> StoredReply | None:
        """A reply outside a turn; None when there is no such conversation."""
        warm = self.known(reply.conversation)
        return None if warm is None else self.reply(warm, reply, deliver)

    def reply(self, warm: _Warm, reply: StoredReply, deliver: bool) -> StoredReply:
        seq = warm.last_seq = warm.last_seq + 1
        msgspec.structs.force_setattr(reply, "seq", seq)  # nobody has seen it yet: it is numbered here
        self._journal.append((warm.row, seq, 1, reply.id, reply.at, _encode(reply)))
        if deliver:
            self._db.execute("INSERT INTO deliveries (conversation, seq) VALUES (?, ?)", (warm.row, seq))
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

    def delivered(self, conversation: str, seq: int) -> None:
        """A reply reached its channel."""
        if (warm := self.known(conversation)) is not None:
            self._db.execute("DELETE FROM deliveries WHERE conversation = ? AND seq = ?", (warm.row, seq))

    def purge_some(self, before: float, after: int) -> tuple[int, int]:
        """Delete what is older among the next 200 conversations: how many, and where to go on (0: done)."""
        self.flush()
        db, busy = self._db, {conversation for conversation, _ in self._open}
        rows = db.execute(
            "SELECT id, name, (SELECT at FROM journal WHERE conversation = c.id ORDER BY seq DESC LIMIT 1)"
            " FROM conversations AS c WHERE id > ? ORDER BY id LIMIT 200",
            (after,),
        ).fetchall()
        count = 0
        for row, name, newest in rows:
            if row in busy or (newest is not None and newest >= before):
                continue
            for table in ("journal", "deliveries", "dead_letters"):
                db.execute(f"DELETE FROM {table} WHERE conversation = ?", (row,))
            db.execute("DELETE FROM conversations WHERE id = ?", (row,))
            self._warm.pop(name, None)
            count += 1
        return count, rows[-1][0] if rows else 0

    def put(self, plugin: str, key: str, value: bytes | None) -> None:
        """A plugin's key; None deletes it."""
        if value is None:
            self._db.execute("DELETE FROM kv WHERE plugin = ? AND key = ?", (plugin, key))
        else:
            self._db.execute(
                "INSERT INTO kv (plugin, key, value) VALUES (?, ?, ?)"
                " ON CONFLICT (plugin, key) DO UPDATE SET value = excluded.value",
                (plugin, key, value),
            )


class Append:
    """A message on its way into the journal. *given* says that its id came from outside and may be a repeat."""

    __slots__ = ("body", "channel", "given", "locale", "message")

    def __init__(self, message: Message, channel: str, locale: str | None, given: bool) -> None:
        self.message = message
        self.body = _encode(message)
        self.channel = channel
        self.locale = locale
        self.given = given

    def __call__(self, journal: Journal) -> Appended:
        return journal.append(self.message, self.body, self.channel, self.locale)


_COLD = (
    "SELECT id, name, channel, locale, assignee, tags, state, closed_at IS NULL,"
    " (SELECT coalesce(max(seq), 0) FROM journal WHERE conversation = conversations.id) FROM conversations "
)


def record_of(name: str, row: tuple[Any, ...]) -> ConversationRecord:
    """A conversation's record from its columns."""
    channel, locale, assignee, tags, state = row
    return ConversationRecord(name, channel, locale, assignee, _decode_tags(tags) if tags else (), state or b"{}")


def _sizes(count: int) -> list[int]:
    """*count* as a sum of few sizes, largest first."""
    found = []
    for size in _CHUNKS:
        while count >= size:
            found.append(size)
            count -= size
    return found
