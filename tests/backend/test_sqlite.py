"""What only the embedded journal has: its file, migrations, group commit, copies. The rest is in test_backend.py."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.web.visitors import open_desk

from conftest import StartDesk, echo, wait_until
from hotdesk.backend import Backend, open_backend
from hotdesk.backend.sqlite_schema import MIGRATIONS
from hotdesk.errors import BackendError
from hotdesk.metrics import Metrics
from hotdesk_sdk import Message


@asynccontextmanager
async def opened(path: Path, registry: CollectorRegistry | None = None) -> AsyncIterator[Backend]:
    backend = await open_backend(f"sqlite:///{path}", Metrics(registry or CollectorRegistry()))
    try:
        yield backend
    finally:
        await backend.aclose()


def message(conversation: str, id: str, text: str = "hi") -> Message:
    return Message(id, conversation, 0, text, at=time.time())


def append(backend: Backend, conversation: str, id: str) -> Any:
    return backend.append(message(conversation, id), channel="", locale=None)


# -- the file ----------------------------------------------------------------------------------------------------


async def test_a_new_file_has_the_newest_version(tmp_path: Path) -> None:
    """A file is made with its folder, in WAL mode, at the newest schema version; opening it again changes nothing."""
    path = tmp_path / "deep" / "folder" / "hotdesk.db"
    for _ in range(2):
        async with opened(path):
            pass
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    """A file of a later hotdesk is not touched, and the text says what to use."""
    path = tmp_path / "hotdesk.db"
    async with opened(path):
        pass
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    with pytest.raises(BackendError, match="use the newer"):
        async with opened(path):
            pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)


async def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    """A URL of another kind names what this version has."""
    with pytest.raises(BackendError, match="sqlite:///path"):
        await open_backend("postgres:///x", Metrics(CollectorRegistry()))


async def test_a_folder_that_can_not_be_is_refused(tmp_path: Path) -> None:
    """A path below a file is a clear stop and no traceback of the library."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="file"):
        async with opened(tmp_path / "file" / "hotdesk.db"):
            pass


async def test_a_look_at_the_heap_is_not_in_the_way_of_a_start(tmp_path: Path) -> None:
    """What was asked of the file before its first commit is read to the end, so that nobody can keep it in progress."""
    looking = threading.Event()

    def look() -> None:
        held = []
        while not looking.is_set():
            held = gc.get_objects()
            time.sleep(0.001)
        held.clear()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for n in range(50):
            async with opened(tmp_path / f"{n}.db"):
                pass
    finally:
        looking.set()
        thread.join()


# -- commits -----------------------------------------------------------------------------------------------------


async def test_one_commit_takes_all_that_waits(tmp_path: Path) -> None:
    """Writes that arrive together share commits: 2,000 writes need far fewer than 2,000."""
    registry = CollectorRegistry()
    async with opened(tmp_path / "db", registry) as backend:
        await asyncio.gather(*(append(backend, f"c{n % 50}", f"m{n}") for n in range(2000)))
    assert registry.get_sample_value("hotdesk_backend_writes_total") == 2000
    assert (registry.get_sample_value("hotdesk_backend_commit_seconds_count") or 0) < 100


# -- recovery and retention --------------------------------------------------------------------------------------


async def test_a_copy_of_a_live_file_recovers(start_desk: StartDesk, tmp_path: Path) -> None:
    """The files of a running host, copied at any moment as a crash leaves them, open with all that was accepted."""
    desk = await start_desk({"echo.py": echo(1)}, data=tmp_path / "live")
    # what a crash leaves is one moment; a copy is one too as long as no checkpoint comes in between
    desk.host.backend._db.execute("PRAGMA wal_autocheckpoint=0")  # type: ignore[attr-defined]
    accepted: list[str] = []

    async def speak(conversation: str) -> None:
        for number in range(40):
            await desk.say("hi", conversation, id=f"{conversation}-{number}")
            accepted.append(f"{conversation}-{number}")

    copies: list[tuple[Path, set[str]]] = []
    speaking = [asyncio.ensure_future(speak(f"c{number}")) for number in range(5)]
    for number in range(5):
        await wait_until(lambda number=number: len(accepted) >= 20 * number + 10, "some more were accepted")
        known, copy = set(accepted), tmp_path / f"copy{number}"
        copy.mkdir()
        for name in ("hotdesk.db", "hotdesk.db-wal"):
            shutil.copy(tmp_path / "live" / name, copy)
        copies.append((copy, known))
    await asyncio.gather(*speaking)
    for copy, known in copies:
        async with opened(copy / "hotdesk.db") as backend:
            kept = set()
            for number in range(5):
                entries = await backend.read(f"c{number}", 0, 1000) or []
                assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
                kept |= {entry.id for entry in entries}
            assert known <= kept
        with closing(sqlite3.connect(copy / "hotdesk.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_retention_is_a_setting(tmp_path: Path) -> None:
    """With retention_days a start deletes conversations that have been silent for longer."""
    async with open_desk(tmp_path, {"echo.py": echo(1)}) as desk:
        await desk.say("hi", "old")
        await desk.say("hi", "fresh")
    with closing(sqlite3.connect(tmp_path / "data" / "hotdesk.db", isolation_level=None)) as db:
        db.execute(
            "UPDATE journal SET at = at - 3 * 86400"
            " WHERE conversation = (SELECT id FROM conversations WHERE name = 'old')"
        )
    async with open_desk(tmp_path, retention_days=2) as desk:

        async def purged() -> bool:
            return await desk.host.backend.record("old") is None

        await wait_until(purged, "the old conversation is gone")
        assert await desk.host.backend.record("fresh") is not None
