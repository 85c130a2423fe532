"""One thread that writes one SQLite file: all that arrives during one commit goes into the next, in order.

Owns how a file is opened for that, how a group that fails is told from a write that does, and what SQLite's errors
are called. What a write does is its asker's.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from ..errors import BackendUnavailable

__all__ = ["BUSY_TIMEOUT_MS", "GroupWriter", "connect", "explain"]

T = TypeVar("T")
D = TypeVar("D")

GROUP = 512
"""How many writes one commit takes at the most: bounds how long the first of a burst waits for the last."""

LOOK_S = 0.5
"""How often the writer looks whether its file is still there."""

BUSY_TIMEOUT_MS = 2_000
"""How long another program's lock on the file is waited for."""


def connect(path: str, *, cache_kib: int) -> sqlite3.Connection:
    """Open *path* for a writer: WAL, and on disk after each commit. Raises `sqlite3.Error`."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=128)
    try:
        for setting in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            f"cache_size=-{cache_kib}",
            "wal_autocheckpoint=4000",
        ):  # read to the end, for one that a look at the heap keeps alive would be in the way of a commit
            db.execute(f"PRAGMA {setting}").fetchall()
    except BaseException:
        db.close()
        raise
    return db


class GroupWriter(Generic[D]):
    """The writer of the file *path*, from `start` to `aclose`.

    *transact* carries out several writes on what they are called with, in one transaction: all, and on disk, or none.
    *on_group* is told of each group, on the loop: how many writes, the seconds, and how many failed.
    """

    def __init__(self, url: str, path: str, *, name: str, on_group: Callable[[int, float, int], None]) -> None:
        self._url = url
        self._path = path
        self._on_group = on_group
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[Callable[[D], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._transact: Callable[[Sequence[Callable[[D], Any]]], list[Any]]
        self._closed = False
        self._inode = 0
        self._looked_at = 0.0
        self._replaced = False
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)

    def start(self, transact: Callable[[Sequence[Callable[[D], Any]]], list[Any]]) -> None:
        """Begin to write. The file is there; if it is deleted or replaced from now on, every write fails."""
        self._inode = os.stat(self._path).st_ino
        self._transact = transact
        self._thread.start()

    def submit(self, work: Callable[[D], T]) -> asyncio.Future[T]:
        """Have *work* done after what was asked for before; its result, once that is on disk.

        Raises `BackendUnavailable` when nothing of it is kept.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(BackendUnavailable(self._url, "the host is stopping"))
        else:
            self._queue.put((work, future))
        return future

    async def aclose(self) -> None:
        """Commit what is queued, and end the thread."""
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    # -- the thread ------------------------------------------------------------------------------------------

    def _next_group(self) -> list[tuple[Callable[[D], Any], asyncio.Future[Any]]]:
        """Wait for a write, and take what else has come by then; empty when it is time to stop."""
        group: list[tuple[Callable[[D], Any], asyncio.Future[Any]]] = []
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
            results = self._commit([work for work, _ in group])
            took = time.perf_counter() - started
            try:
                self._loop.call_soon_threadsafe(self._settle, [future for _, future in group], results, took)
            except RuntimeError:
                return  # the loop is gone: nobody waits

    def _is_replaced(self) -> bool:
        """Whether the file is not the one that was opened: what is written then is gone with the last process."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_S:
            self._looked_at = now
            try:
                self._replaced = os.stat(self._path).st_ino != self._inode
            except OSError:
                self._replaced = True
        return self._replaced

    def _commit(self, works: list[Callable[[D], Any]]) -> list[Any]:
        """One transaction for all; if that fails, one for each, so that a bad write harms nobody else's."""
        if self._is_replaced():
            failure = BackendUnavailable(self._url, "its file was deleted or replaced under the host; start it again")
            return [failure] * len(works)
        try:
            return self._transact(works)
        except sqlite3.Error as exc:
            if len(works) == 1 or _is_everybodys(exc):
                failure = BackendUnavailable(self._url, explain(exc))
                return [failure] * len(works)
        except Exception as exc:  # a fault of ours in one write must not take the writer thread with it
            if len(works) == 1:
                return [exc]
        return [result for work in works for result in self._commit([work])]

    def _settle(self, futures: list[asyncio.Future[Any]], results: list[Any], took: float) -> None:
        failed = 0
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                failed += 1
                future.set_exception(result)
            else:
                future.set_result(result)
        self._on_group(len(futures), took, failed)


def _is_everybodys(exc: sqlite3.Error) -> bool:
    """Whether a failure concerns the file and not one write in it."""
    return isinstance(exc, sqlite3.OperationalError) or type(exc) is sqlite3.DatabaseError


def explain(exc: BaseException) -> str:
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
