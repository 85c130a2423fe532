"""The embedded journal: migrations, group commit, order, recovery, retention."""

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
from hotdesk.backend import Backend, ConversationRecord, StoredReply, TurnEnd, open_backend
from hotdesk.backend.sqlite_schema import MIGRATIONS
from hotdesk.errors import BackendError, BackendUnavailable
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


def reply(conversation: str, to: str | None, id: str = "r1") -> StoredReply:
    return StoredReply(id, conversation, 0, to, "answer", "echo", 1, {}, time.time())


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


# -- what is kept ------------------------------------------------------------------------------------------------


async def test_appends_are_numbered_in_the_order_asked(tmp_path: Path) -> None:
    """Appends of one moment get seq 1, 2, 3 … in the order they were asked for, in every conversation."""
    async with opened(tmp_path / "db") as backend:
        asked = [append(backend, f"c{n % 3}", f"m{n}") for n in range(300)]
        seqs = [(await future).seq for future in asked]
        assert seqs == [n // 3 + 1 for n in range(300)]
        entries = await backend.read("c1", 0, 1000)
        assert entries is not None
        assert [(entry.id, entry.seq) for entry in entries] == [(f"m{3 * n + 1}", n + 1) for n in range(100)]


async def test_one_commit_takes_all_that_waits(tmp_path: Path) -> None:
    """Writes that arrive together share commits: 2,000 writes need far fewer than 2,000."""
    registry = CollectorRegistry()
    async with opened(tmp_path / "db", registry) as backend:
        await asyncio.gather(*(append(backend, f"c{n % 50}", f"m{n}") for n in range(2000)))
    assert registry.get_sample_value("hotdesk_backend_writes_total") == 2000
    assert (registry.get_sample_value("hotdesk_backend_commit_seconds_count") or 0) < 100


async def test_the_same_id_in_one_commit_is_one_message(tmp_path: Path) -> None:
    """An id that comes many times at once is kept once, and every repeat is told the first one's seq."""
    async with opened(tmp_path / "db") as backend:
        outcomes = await asyncio.gather(*(append(backend, "c", f"m{n % 2}") for n in range(100)))
        assert sorted({(o.seq, o.duplicate) for o in outcomes}) == [(1, False), (1, True), (2, False), (2, True)]
        assert sum(not o.duplicate for o in outcomes) == 2
        assert [o.opened for o in outcomes].count(True) == 1


async def test_a_turn_ends_once(tmp_path: Path) -> None:
    """The second end of a turn keeps nothing and says so; one turn has one reply."""
    async with opened(tmp_path / "db") as backend:
        await append(backend, "c", "m1")
        first = await backend.finish(TurnEnd("c", 1, (reply("c", "m1", "r1"),)))
        assert first is not None
        assert first[0].seq == 2
        assert await backend.finish(TurnEnd("c", 1, (reply("c", "m1", "r2"),))) is None
        entries = await backend.read("c", 0, 10)
        assert entries is not None
        assert [entry.id for entry in entries] == ["m1", "r1"]


async def test_the_outcome_of_a_message_is_found(tmp_path: Path) -> None:
    """An open turn has no outcome yet; an ended one has its replies; an ended one without reply has none."""
    async with opened(tmp_path / "db") as backend:
        for id in ("m1", "m2"):
            await append(backend, "c", id)
        assert not (await backend.outcome("c", 1, "m1")).ended
        await backend.finish(TurnEnd("c", 1, (reply("c", "m1"),)))
        await backend.finish(TurnEnd("c", 2))
        assert [r.id for r in (await backend.outcome("c", 1, "m1")).replies] == ["r1"]
        assert (await backend.outcome("c", 2, "m2")).ended
        assert (await backend.outcome("c", 2, "m2")).replies == ()


async def test_state_is_kept_with_the_turns_end(tmp_path: Path) -> None:
    """What a turn changed in its conversation is there after reopening; closing forgets it, and the next opens anew."""
    record = ConversationRecord("c", "", "de", "ann", ("vip",), b'{"a":1}')
    async with opened(tmp_path / "db") as backend:
        await append(backend, "c", "m1")
        await backend.finish(TurnEnd("c", 1, (), record))
    async with opened(tmp_path / "db") as backend:
        assert await backend.record("c") == record
        again = await append(backend, "c", "m2")
        assert (again.opened, again.conversation) == (False, record)
        await backend.finish(TurnEnd("c", 2, (), record, closed=True))
        reopened = await append(backend, "c", "m3")
        assert (reopened.opened, reopened.conversation.state, reopened.seq) == (True, b"{}", 3)


async def test_what_has_no_end_is_unfinished(tmp_path: Path) -> None:
    """After a stop, exactly the messages without a turn's end are listed, in order, with their conversation."""
    async with opened(tmp_path / "db") as backend:
        for n in range(1, 6):
            await append(backend, "c", f"m{n}")
        await backend.finish(TurnEnd("c", 2))
        await backend.finish(TurnEnd("c", 4))
    async with opened(tmp_path / "db") as backend:
        assert [(m.id, m.seq, record.id) for m, record in await backend.unfinished()] == [
            ("m1", 1, "c"), ("m3", 3, "c"), ("m5", 5, "c"),
        ]  # fmt: skip


async def test_a_reply_outside_a_turn_needs_a_conversation(tmp_path: Path) -> None:
    """Posting into a conversation in which nothing was said keeps nothing."""
    async with opened(tmp_path / "db") as backend:
        assert await backend.post(reply("c", None), deliver=False) is None
        await append(backend, "c", "m1")
        posted = await backend.post(reply("c", None), deliver=True)
        assert posted is not None
        assert posted.seq == 2
        assert [r.id for r, _ in await backend.undelivered()] == ["r1"]
        await backend.delivered("c", 2)
        assert await backend.undelivered() == []


async def test_reading_an_unknown_conversation_is_none(tmp_path: Path) -> None:
    """Nothing said is None, and not an empty record."""
    async with opened(tmp_path / "db") as backend:
        assert await backend.read("never", 0, 10) is None
        assert await backend.record("never") is None
        assert await backend.history("never", 5, 10) == []


async def test_history_is_the_newest_oldest_first(tmp_path: Path) -> None:
    """History gives the newest entries below a seq, oldest first."""
    async with opened(tmp_path / "db") as backend:
        for n in range(1, 11):
            await append(backend, "c", f"m{n}")
        assert [entry.seq for entry in await backend.history("c", 8, 3)] == [5, 6, 7]


async def test_keys_belong_to_their_plugin(tmp_path: Path) -> None:
    """Keys of one plugin are not another's; a prefix is a prefix and no pattern; None deletes."""
    async with opened(tmp_path / "db") as backend:
        for plugin, key in (("a", "x%1"), ("a", "x_2"), ("a", "y"), ("b", "x")):
            await backend.kv_set(plugin, key, b"1")
        assert await backend.kv_keys("a", "x") == ["x%1", "x_2"]
        assert await backend.kv_keys("a", "x%") == ["x%1"]
        await backend.kv_set("a", "y", None)
        assert await backend.kv_get("a", "y") is None
        assert await backend.kv_get("b", "x") == b"1"


async def test_a_bad_write_harms_nobody_elses(tmp_path: Path) -> None:
    """A write that can't be kept fails alone; those of the same commit are kept."""
    async with opened(tmp_path / "db") as backend:
        futures = [append(backend, "c", f"m{n}") for n in range(5)]
        bad = backend.append(message("bad", "m"), channel="\ud800", locale=None)
        futures += [append(backend, "c", f"m{n}") for n in range(5, 10)]
        assert [(await future).seq for future in futures] == list(range(1, 11))
        with pytest.raises(UnicodeEncodeError):
            await bad
        assert await backend.record("bad") is None


async def test_closing_keeps_what_was_asked_before(tmp_path: Path) -> None:
    """What was asked for before the close is on disk after it; what comes after is refused."""
    async with opened(tmp_path / "db") as backend:
        futures = [append(backend, "c", f"m{n}") for n in range(100)]
    assert [(await future).seq for future in futures] == list(range(1, 101))
    with pytest.raises(BackendUnavailable):
        await append(backend, "c", "late")


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


async def test_a_purge_deletes_whole_old_conversations(tmp_path: Path) -> None:
    """What has been silent since the date goes with all that was said; what spoke since, or has an open turn, stays."""
    async with opened(tmp_path / "db") as backend:
        now = time.time()
        for name, at, ended in (("old", now - 1000, True), ("fresh", now, True), ("open", now - 1000, False)):
            await backend.append(Message("m", name, 0, "hi", at=at), channel="", locale=None)
            if ended:
                await backend.finish(TurnEnd(name, 1, (StoredReply("r", name, 0, "m", "x", "p", 1, {}, at),)))
        assert await backend.purge(now - 500) == 1
        assert await backend.read("old", 0, 10) is None
        assert await backend.read("fresh", 0, 10)
        assert await backend.read("open", 0, 10)
        again = await backend.append(Message("m", "old", 0, "hi", at=now), channel="", locale=None)
        assert (again.seq, again.duplicate, again.opened) == (1, False, True)


async def test_a_purge_goes_through_many_conversations(tmp_path: Path) -> None:
    """A purge of more conversations than one step takes deletes them all."""
    async with opened(tmp_path / "db") as backend:
        old = time.time() - 1000
        for n in range(700):
            backend.append(Message("m", f"c{n}", 0, "hi", at=old), channel="", locale=None)
            backend.finish(TurnEnd(f"c{n}", 1))
        assert await backend.purge(time.time() - 500) == 700


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
