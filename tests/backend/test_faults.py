"""Disks that are full, files that are locked, damaged or taken: a clear stop or 503, and never a false `accepted`."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.web.visitors import open_desk

from conftest import Desk, StartDesk, echo, wait_until
from hotdesk.errors import BackendError, DataFolderHeld


async def send(desk: Desk, id: str, conversation: str = "c", text: str = "hi") -> tuple[int, dict[str, Any], Any]:
    async with desk.http.post(
        f"{desk.url}/v1/conversations/{conversation}/messages", json={"text": text, "id": id}
    ) as response:
        return response.status, await response.json(), response.headers.get("Retry-After")


def kept_ids(path: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return {id for (id,) in db.execute("SELECT id FROM journal WHERE kind = 0")}


async def ready(desk: Desk) -> int:
    async with desk.http.get(f"{desk.url}/readyz") as response:
        return response.status


# -- the disk is full --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_a_full_disk_accepts_nothing_and_recovers(start_desk: StartDesk, small_disk: Path) -> None:
    """On a full disk every message is 503 backend_unavailable; what was accepted is all there; with room it goes on."""
    desk = await start_desk({"echo.py": echo(1)}, data=small_disk / "data")
    accepted, refused = await fill(desk, small_disk / "data" / "hotdesk.db")
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    await goes_on(desk, small_disk / "data" / "hotdesk.db", accepted, refused)


async def test_a_file_at_its_limit_accepts_nothing_and_recovers(start_desk: StartDesk, tmp_path: Path) -> None:
    """SQLite's own `database or disk is full` is 503 too, names the remedy, and passes when there is room again."""
    desk = await start_desk({"echo.py": echo(1)}, data=tmp_path / "data")
    database = desk.host.backend._db  # type: ignore[attr-defined]
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count={pages + 40}")
    accepted, refused = await fill(desk, tmp_path / "data" / "hotdesk.db")
    database.execute("PRAGMA max_page_count=1000000")
    await goes_on(desk, tmp_path / "data" / "hotdesk.db", accepted, refused)


async def fill(desk: Desk, path: Path) -> tuple[set[str], set[str]]:
    """Send until nothing more is taken: what was accepted, and what was refused."""
    accepted, refused = set(), set()
    for number in range(4000):
        status, body, retry_after = await send(desk, f"m{number}", f"c{number % 7}", "x" * 3000)
        if status == 202:
            accepted.add(f"m{number}")
            continue
        assert (status, body["error"]["code"]) == (503, "backend_unavailable"), body
        assert "disk" in body["error"]["message"]
        assert retry_after
        refused.add(f"m{number}")
        if len(refused) == 20:
            break
    assert len(refused) == 20
    assert accepted
    assert kept_ids(path) >= accepted
    assert not kept_ids(path) & refused
    return accepted, refused


async def goes_on(desk: Desk, path: Path, accepted: set[str], refused: set[str]) -> None:
    """With room again messages are accepted, every accepted one is answered once, no refused one ever was kept."""

    async def takes() -> bool:
        return (await send(desk, "after"))[0] == 202

    await wait_until(takes, "messages are taken again")
    await wait_until(lambda: desk.host.turns.live == 0, "every turn ended", 15)
    assert await ready(desk) == 200
    assert kept_ids(path) == accepted | {"after"}
    for number in range(7):
        record = await desk.record(f"c{number}")
        assert [entry["seq"] for entry in record] == list(range(1, len(record) + 1))
        answered = [entry["to"] for entry in record if entry["type"] == "reply"]
        assert sorted(answered) == sorted(entry["id"] for entry in record if entry["type"] == "message")
    again = sorted(refused)[0]
    assert (await send(desk, again))[0] == 202


# -- the file is locked ------------------------------------------------------------------------------------------


async def test_a_locked_file_is_503_and_passes(start_desk: StartDesk, tmp_path: Path) -> None:
    """While another program holds the file's lock a message is 503 and not kept; then it is taken, and reads go on."""
    desk = await start_desk({"echo.py": echo(1)}, data=tmp_path / "data")
    path = tmp_path / "data" / "hotdesk.db"
    await desk.say("before", id="before")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answers = await asyncio.gather(*(send(desk, f"m{number}", f"c{number}") for number in range(10)))
        assert {(status, body["error"]["code"]) for status, body, _ in answers} == {(503, "backend_unavailable")}
        assert "locked" in answers[0][1]["error"]["message"]
        assert await ready(desk) == 503
        assert len(await desk.record()) == 2
        other.execute("ROLLBACK")
    assert kept_ids(path) == {"before"}
    assert (await desk.say("after"))["replies"][0]["text"] == "1: after"
    assert await ready(desk) == 200


async def test_a_turn_that_ends_while_the_file_is_locked_is_kept_after(start_desk: StartDesk, tmp_path: Path) -> None:
    """A reply that can't be written is told to nobody until it is: then it is written once."""
    source = (
        "import asyncio\nfrom hotdesk_sdk import hookimpl\nGO = asyncio.Event()\n"
        "@hookimpl\nasync def routes():\n"
        "    async def go(request):\n        GO.set()\n        return 'gone'\n"
        "    return [('GET', '/go', go)]\n"
        "@hookimpl\nasync def respond(turn):\n    await GO.wait()\n    return 'done'\n"
    )
    desk = await start_desk({"gated.py": source}, data=tmp_path / "data")
    waiting = asyncio.ensure_future(desk.say("hi"))
    await wait_until(lambda: desk.host.turns.live == 1, "the turn runs")
    with closing(sqlite3.connect(tmp_path / "data" / "hotdesk.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with desk.http.get(f"{desk.url}/p/gated/go"):
            pass
        errors = "hotdesk_backend_errors_total"
        await wait_until(lambda: desk.host.metrics.registry.get_sample_value(errors), "the end could not be kept")
        assert not waiting.done()
        other.execute("ROLLBACK")
    assert [reply["text"] for reply in (await waiting)["replies"]] == ["done"]
    assert len(await desk.record()) == 2


# -- the file is damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"this is no database, " * 500, os.urandom(65536), b"SQLite format 3\0" + b"\xff" * 8176]
)
async def test_a_damaged_file_stops_the_start(tmp_path: Path, content: bytes) -> None:
    """A file that is no database stops the start with its path and what to do, and is left as it is."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "hotdesk.db"
    path.write_bytes(content)
    with pytest.raises(BackendError, match=r"(?s)hotdesk\.db.*(damaged|backup)"):
        async with open_desk(tmp_path):
            pass
    assert path.read_bytes() == content
    path.unlink()
    async with open_desk(tmp_path, {"echo.py": echo(1)}) as desk:
        assert await desk.reply() == "1: hello"


async def test_garbage_in_a_live_file_is_an_error_and_no_false_accepted(tmp_path: Path) -> None:
    """When the file's pages turn to garbage under a running host, doors answer 503, and no `accepted` is false."""
    path = tmp_path / "data" / "hotdesk.db"
    async with open_desk(tmp_path, {"echo.py": echo(1)}) as desk:
        for number in range(30):
            await desk.say("x" * 2000, f"c{number}")
    async with open_desk(tmp_path, stop_timeout_s=0.5) as desk:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(size - 4096))
        taken = set()
        for number in range(30):
            status, body, _ = await send(desk, f"n{number}", f"c{number}")
            if status == 202:
                taken.add(f"n{number}")
            else:
                assert (status, body["error"]["code"]) == (503, "backend_unavailable"), body
            async with desk.http.get(f"{desk.url}/v1/conversations/c{number}/messages") as response:
                assert response.status in (200, 404, 503), await response.text()
        assert not taken or kept_ids(path) >= taken


async def test_a_damaged_row_is_503_and_names_itself(start_desk: StartDesk, tmp_path: Path) -> None:
    """A row that can't be read makes its conversation's record 503; the others are not touched."""
    desk = await start_desk({"echo.py": echo(1)}, data=tmp_path / "data")
    await desk.say("hi", "good")
    await desk.say("hi", "bad")
    with closing(sqlite3.connect(tmp_path / "data" / "hotdesk.db", isolation_level=None)) as other:
        other.execute(
            "UPDATE journal SET body = x'ff' WHERE conversation = (SELECT id FROM conversations WHERE name = 'bad')"
        )
    async with desk.http.get(f"{desk.url}/v1/conversations/bad/messages") as response:
        body = await response.json()
        assert (response.status, body["error"]["code"]) == (503, "backend_unavailable")
        assert "damaged" in body["error"]["message"]
    assert len(await desk.record("good")) == 2
    assert await desk.reply("again", "bad") == "1: again"


# -- the folder is taken -----------------------------------------------------------------------------------------


async def test_a_second_host_on_the_same_folder_is_refused(start_desk: StartDesk, tmp_path: Path) -> None:
    """A second host, in this process or another, is refused with the folder and the holder's pid; the first goes on."""
    desk = await start_desk({"echo.py": echo(1)}, data=tmp_path / "data")
    with pytest.raises(DataFolderHeld, match=rf"pid {os.getpid()}\b"):
        async with open_desk(tmp_path):
            pass
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hotdesk", "run", "--port", "0", "--data", str(tmp_path / "data"), cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, err = await asyncio.wait_for(other.communicate(), 20)
    assert other.returncode
    text = " ".join(err.decode().split())
    assert f"pid {os.getpid()}" in text
    assert "Traceback" not in text
    assert await desk.reply() == "1: hello"


async def test_a_folder_is_free_after_a_kill(tmp_path: Path) -> None:
    """The lock ends with its process, however that ends: a killed host's folder can be used at once."""
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c",
        "import sys, time, pathlib; from hotdesk.backend.lock import FolderLock\n"
        "FolderLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)",
        str(tmp_path / "data"), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    with pytest.raises(DataFolderHeld, match=f"pid {holder.pid}"):
        async with open_desk(tmp_path):
            pass
    holder.kill()
    await holder.wait()
    async with open_desk(tmp_path, {"echo.py": echo(1)}) as desk:
        assert await desk.reply() == "1: hello"


async def test_a_folder_that_can_not_be_written_stops_the_start(tmp_path: Path) -> None:
    """A data folder that is a file stops the start with its path and the setting."""
    (tmp_path / "data").write_text("")
    with pytest.raises(BackendError, match="--data"):
        async with open_desk(tmp_path):
            pass
    shutil.rmtree(tmp_path / "plugins")
