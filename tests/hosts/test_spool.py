"""`spool = true`: while Redis is away messages go onto this machine's disk, and from there into the journal, once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.hosts.away import WAYS, Reach, gauge, kept_in, post
from tests.hosts.conftest import TALKER
from tests.load.hosts import Server, host_on
from tests.redis_servers import RedisServer
from tests.web.test_promises import connect, next_frame
from tests.web.visitors import open_desk, sse_events
from tests.workers.desk import WHO, WorkerDesk, starting

from conftest import Desk, StartDesk, wait_until
from hotdesk.backend.sqlite_spool import SpoolFile
from hotdesk.config import Config, load_config
from hotdesk.errors import ConfigError
from hotdesk_sdk import Message

BACK_S = 30.0
"""For what takes a second or two."""

HOOK = """
from hotdesk_sdk import hookimpl

@hookimpl
async def intake(request):
    found = [{"conversation": "hooked", "text": text} for text in request.text().split()]
    return found, "thanks"

@hookimpl
async def respond(turn):
    return f"heard {turn.text}"
"""


@pytest.fixture
async def reach(own_redis: RedisServer) -> AsyncIterator[Reach]:
    async with Reach.to(own_redis) as reach:
        yield reach


@pytest.fixture
async def desk(start_desk: StartDesk, reach: Reach) -> Desk:
    return await start_desk({"talker.py": TALKER}, backend=reach.url, spool=True, spool_mb=1)


async def ready(desk: Desk) -> tuple[int, dict[str, Any]]:
    async with desk.http.get(f"{desk.url}/readyz") as response:
        return response.status, await response.json()


async def emptied(desk: Desk) -> None:
    async def is_empty() -> bool:
        return await gauge(desk, "hotdesk_spool_messages") == 0

    await wait_until(is_empty, "the spool is empty", BACK_S)


async def answered(http: aiohttp.ClientSession, url: str, conversation: str, count: int) -> None:
    """Wait until *count* messages of a conversation have their replies."""

    async def is_answered() -> bool:
        path = f"{url}/v1/conversations/{conversation}/messages"
        async with http.get(path, params={"limit": "1000"}) as response:
            entries = (await response.json()).get("messages", ())
        return sum(entry["type"] == "reply" for entry in entries) >= count

    await wait_until(is_answered, f"{count} messages of {conversation} are answered", BACK_S)


# -- what the doors say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_a_websocket_hears_spooled_and_later_accepted(desk: Desk, reach: Reach, way: str) -> None:
    """Messages sent in one go while Redis goes: each spooled, then accepted, in order, once, however it went."""
    async with connect(desk) as ws:
        await ws.send_json({"type": "message", "id": "first", "text": "hello"})
        assert (await next_frame(ws, "reply"))["seq"] == 2
        await reach.lose(way)
        ids = [f"m{number}" for number in range(5)]
        for id in ids:
            await ws.send_json({"type": "message", "id": id, "text": "hello"})
        spooled = [await ws.receive_json(timeout=10) for _ in ids]
        assert spooled == [{"type": "spooled", "id": id} for id in ids]
        await reach.find()
        accepted = [await next_frame(ws, "accepted") for _ in ids]
        assert [frame["id"] for frame in accepted] == ids
        assert [frame["seq"] for frame in accepted] == sorted(frame["seq"] for frame in accepted)
    await emptied(desk)
    await answered(desk.http, desk.url, "c", 6)
    assert await kept_in(desk.http, desk.url, ["c"]) == {"c": ["first", *ids]}


async def test_a_post_is_spooled_at_once_and_so_is_its_repeat(desk: Desk, reach: Reach) -> None:
    """202 `spooled` with no seq, also with ?wait; the same id again says the same; in the end it is one message."""
    await reach.lose("cut off")
    said = {"id": "m", "conversation": "c", "seq": None, "status": "spooled"}
    for query in ({}, {"wait": "30"}, {}):
        async with desk.http.post(
            f"{desk.url}/v1/conversations/c/messages", json={"text": "count", "id": "m"}, params=query
        ) as response:
            assert (response.status, await response.json()) == (202, said)
    status, body = await post(desk.http, desk.url, "c", "count")
    assert (status, body["status"], body["seq"]) == (202, "spooled", None)
    assert await gauge(desk, "hotdesk_spool_messages") == 2
    assert await gauge(desk, "hotdesk_spooled_total") == 2
    status, probed = await ready(desk)
    assert (status, probed["status"], probed["spooled"]) == (200, "degraded", 2)
    assert probed["problem"].startswith("backend redis://")
    await reach.find()
    await emptied(desk)
    await answered(desk.http, desk.url, "c", 2)
    assert await kept_in(desk.http, desk.url, ["c"]) == {"c": ["m", body["id"]]}
    assert (await desk.say("count", id="m"))["seq"] == 1
    status, probed = await ready(desk)
    assert (status, probed["status"], probed["spooled"]) == (200, "ready", 0)


async def test_an_event_stream_says_spooled_and_goes_on(desk: Desk, reach: Reach) -> None:
    """`Accept: text/event-stream`: spooled, and when Redis is back accepted, chunks, the reply, done."""
    await reach.lose("cut off")
    kinds: list[str] = []
    async with desk.http.post(
        f"{desk.url}/v1/conversations/c/messages", json={"text": "words one two", "id": "m"},
        headers={"Accept": "text/event-stream"},
    ) as response:  # fmt: skip
        assert response.status == 200
        async for event in sse_events(response):
            kinds.append(event.kind)
            if event.kind == "spooled":
                assert event.data == {"id": "m", "conversation": "c", "seq": None, "status": "spooled"}
                await reach.find()
            if event.kind == "accepted":
                assert event.data == {"id": "m", "conversation": "c", "seq": 1, "status": "accepted"}
    assert [kind for kind in kinds if kind != "chunk"] == ["spooled", "accepted", "reply", "done"]
    assert "chunk" in kinds


async def test_an_event_stream_of_a_message_that_was_answered_before(desk: Desk, reach: Reach) -> None:
    """A repeat that is spooled hears its reply once Redis is back, and done."""
    reply = (await desk.say("hello", id="m"))["replies"][0]
    await reach.lose("cut off")
    told: list[tuple[str, Any]] = []
    async with desk.http.post(
        f"{desk.url}/v1/conversations/c/messages", json={"text": "hello", "id": "m"},
        headers={"Accept": "text/event-stream"},
    ) as response:  # fmt: skip
        async for event in sse_events(response):
            told.append((event.kind, event.data))
            if event.kind == "spooled":
                await reach.find()
    assert [kind for kind, _ in told] == ["spooled", "accepted", "reply", "done"]
    assert told[2][1]["id"] == reply["id"]
    assert len(await desk.record()) == 2


async def test_a_webhook_is_answered_and_its_messages_are_spooled(start_desk: StartDesk, reach: Reach) -> None:
    """What a webhook brings while Redis is away is on disk before its answer, and in the journal later, in order."""
    desk = await start_desk({"hook.py": HOOK}, backend=reach.url, spool=True)
    await reach.lose("cut off")
    async with desk.http.post(f"{desk.url}/hooks/hook", data="one two three") as response:
        assert (response.status, await response.text()) == (200, "thanks")
    assert await gauge(desk, "hotdesk_spool_messages") == 3
    await reach.find()
    await answered(desk.http, desk.url, "hooked", 3)
    texts = [entry["text"] for entry in await desk.record("hooked") if entry["type"] == "message"]
    assert texts == ["one", "two", "three"]


async def test_a_spooled_message_is_cancelled_when_it_is_accepted(desk: Desk, reach: Reach) -> None:
    """A cancel that comes while its message is in the spool is kept for its turn."""
    await reach.lose("cut off")
    async with connect(desk) as ws:
        await ws.send_json({"type": "message", "text": "wait for ever"})
        id = (await next_frame(ws, "spooled"))["id"]
        await ws.send_json({"type": "cancel", "to": id})
        await reach.find()
        assert (await next_frame(ws, "accepted"))["id"] == id
        frame = await next_frame(ws, "error")
        assert (frame["code"], frame["to"]) == ("cancelled", id)


async def test_a_message_whose_answer_was_lost_is_one_message(desk: Desk, reach: Reach) -> None:
    """Redis kept it, and the connection broke before it could say so: spooled, and in the end there once."""
    await desk.say("count", id="first")
    reach.link.delay_s = 0.3
    sending = asyncio.ensure_future(post(desk.http, desk.url, "c", "count", id="m"))

    async def is_kept() -> bool:
        keys = await reach.server.command("KEYS", "*}:j:c")
        return await reach.server.command("LLEN", keys[0]) == 3

    await wait_until(is_kept, "Redis has it")
    assert not sending.done()
    reach.link.cut()
    reach.link.delay_s = 0.0
    assert (await sending)[1]["status"] == "spooled"
    await reach.find()
    await emptied(desk)
    await answered(desk.http, desk.url, "c", 2)
    assert await kept_in(desk.http, desk.url, ["c"]) == {"c": ["first", "m"]}


# -- order ---------------------------------------------------------------------------------------------------------


async def test_what_comes_while_it_drains_goes_behind(desk: Desk, reach: Reach) -> None:
    """Visitors who never pause while Redis goes and comes: each conversation has all of theirs, once, in order."""
    names = [f"c{number}" for number in range(12)]
    sent: dict[str, list[str]] = {name: [] for name in names}
    statuses: list[str] = []
    over = asyncio.Event()

    async def speak(name: str) -> None:
        while not over.is_set():
            id = f"{name}-{len(sent[name])}"
            status, body = await post(desk.http, desk.url, name, "count", id=id)
            assert status == 202, body
            sent[name].append(id)
            statuses.append(body["status"])

    speaking = [asyncio.ensure_future(speak(name)) for name in names]
    await wait_until(lambda: statuses.count("accepted") > 50, "messages are accepted")
    await reach.lose("cut off")
    await wait_until(lambda: statuses.count("spooled") > 300, "messages are spooled")
    reach.link.delay_s = 0.005
    await reach.find()

    async def has_drained() -> bool:
        return await gauge(desk, "hotdesk_spooled_total") - await gauge(desk, "hotdesk_spool_messages") > 150

    await wait_until(has_drained, "messages came while it drained", BACK_S)
    reach.link.delay_s = 0.0
    accepted = statuses.count("accepted")
    await wait_until(lambda: statuses.count("accepted") > accepted + 50, "messages are accepted again", BACK_S)
    over.set()
    await asyncio.gather(*speaking)
    await emptied(desk)
    for name in names:
        await answered(desk.http, desk.url, name, len(sent[name]))
    assert await kept_in(desk.http, desk.url, names) == sent


async def drain_slowly(desk: Desk, reach: Reach, ids: list[str]) -> None:
    """Have *ids* in the spool for conversation c, and the first of them on its way out, a third of a second each."""
    await reach.lose("cut off")
    for id in ids:
        assert (await post(desk.http, desk.url, "c", id=id))[1]["status"] == "spooled"
    await reach.find()
    reach.link.delay_s = 0.15

    async def has_begun() -> bool:
        return await gauge(desk, "hotdesk_spool_messages") < len(ids)

    await wait_until(has_begun, "the spool is being emptied", BACK_S)


async def test_who_comes_behind_many_is_told_spooled_at_last(desk: Desk, reach: Reach) -> None:
    """A message whose conversation is being drained waits for it, but not for long: then it is spooled, and behind."""
    ids = [f"m{number}" for number in range(8)]
    await drain_slowly(desk, reach, ids)
    assert (await post(desk.http, desk.url, "c", id="last"))[1]["status"] == "spooled"
    reach.link.delay_s = 0.0
    await answered(desk.http, desk.url, "c", 9)
    assert await kept_in(desk.http, desk.url, ["c"]) == {"c": [*ids, "last"]}


async def test_a_stop_while_it_drains_keeps_who_waits_behind(reach: Reach, tmp_path: Path) -> None:
    """The host stops before their turn came: they are spooled then, are told so, and follow at the next start."""
    ids = [f"m{number}" for number in range(8)]
    frames: list[dict[str, Any]] = []

    async def listen(ws: aiohttp.ClientWebSocketResponse) -> None:
        async for frame in ws:
            frames.append(frame.json())  # noqa: PERF401 - it is looked at while it grows

    async with aiohttp.ClientSession() as http:
        async with started(reach, tmp_path / "data", spool=True, stop_timeout_s=0.2) as desk:
            await drain_slowly(desk, reach, ids)
            ws = await http.ws_connect(f"{desk.url}/v1/ws?conversation=c")
            listening = asyncio.ensure_future(listen(ws))
            await ws.send_json({"type": "message", "id": "last", "text": "hello"})
            await ws.send_json({"type": "ping"})
            await wait_until(lambda: {"type": "pong"} in frames, "the message has come in")
        await listening
        assert ws.close_code == 1012
        assert {"type": "spooled", "id": "last"} in frames
    reach.link.delay_s = 0.0
    async with started(reach, tmp_path / "data", spool=True) as desk:
        await answered(desk.http, desk.url, "c", 9)
        assert await kept_in(desk.http, desk.url, ["c"]) == {"c": [*ids, "last"]}


# -- its bound, and the disk -----------------------------------------------------------------------------------------


async def test_a_full_spool_takes_nothing_more(desk: Desk, reach: Reach) -> None:
    """Over spool_mb a message is 503 and names the setting; so is /readyz; what was spooled is there in the end."""
    await reach.lose("cut off")
    statuses: list[int] = []
    for number in range(15):
        status, body = await post(desk.http, desk.url, "c", "x" * 100_000, id=f"m{number}")
        statuses.append(status)
    taken = statuses.count(202)
    assert statuses == [202] * taken + [503] * (15 - taken)
    assert 9 <= taken <= 12
    assert body["error"]["code"] == "backend_unavailable"
    assert "spool_mb" in body["error"]["message"]
    assert (await ready(desk))[0] == 503
    await reach.find()
    await emptied(desk)
    await answered(desk.http, desk.url, "c", taken)
    assert await kept_in(desk.http, desk.url, ["c"]) == {"c": [f"m{number}" for number in range(taken)]}
    await reach.lose("cut off")
    assert (await post(desk.http, desk.url, "c", "x" * 100_000, id="more"))[0] == 202


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


async def test_a_full_disk_is_no_promise(start_desk: StartDesk, reach: Reach, small_disk: Path) -> None:
    """What does not fit on the disk is 503, and what was `spooled` before and after is in the journal in the end."""
    desk = await start_desk({"talker.py": TALKER}, backend=reach.url, spool=True, data=small_disk / "data")
    await reach.lose("cut off")
    taken: list[str] = []
    refused = 0
    for number in range(60):
        status, body = await post(desk.http, desk.url, f"c{number % 3}", "x" * 100_000, id=f"m{number}")
        if status == 202:
            taken.append(f"m{number}")
        else:
            refused += 1
            assert (status, body["error"]["code"]) == (503, "backend_unavailable")
            assert "disk" in body["error"]["message"]
            assert (await ready(desk))[0] == 503
    assert taken
    assert refused
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    status, body = await post(desk.http, desk.url, "c0", id="room")
    assert (status, body["status"]) == (202, "spooled")
    assert (await ready(desk))[0] == 200
    taken.append("room")
    await reach.find()
    await emptied(desk)
    kept = await kept_in(desk.http, desk.url, ["c0", "c1", "c2"])
    assert sorted(id for ids in kept.values() for id in ids) == sorted(taken)


# -- stops and kills -------------------------------------------------------------------------------------------------


async def test_what_is_spooled_outlives_a_stop(start_desk: StartDesk, reach: Reach, tmp_path: Path) -> None:
    """The next start puts it into the journal, in order, and leaves no file behind; so does one without a spool."""
    data = tmp_path / "data"
    ids: list[str] = []
    for taking in (True, False):
        async with started(reach, data, spool=True) as desk:
            await reach.lose("cut off")
            for number in range(3):
                ids.append(f"{taking}-{number}")
                assert (await post(desk.http, desk.url, "c", id=ids[-1]))[1]["status"] == "spooled"
        assert [path.name for path in (data / "spool").glob("*.db")] == ["host.db"]
        await reach.find()
        async with started(reach, data, spool=taking) as desk:
            await answered(desk.http, desk.url, "c", len(ids))
            assert await kept_in(desk.http, desk.url, ["c"]) == {"c": ids}
            await emptied(desk)
            if not taking:
                await reach.lose("cut off")
                assert (await post(desk.http, desk.url, "c"))[0] == 503
                await reach.find()
        assert list((data / "spool").iterdir()) == []


def started(reach: Reach, data: Path, *, spool: bool, **config: Any) -> Any:
    """A host in *data*, for the time of a context."""
    return open_desk(data.parent, {"talker.py": TALKER}, backend=reach.url, spool=spool, data=str(data), **config)


async def test_the_spool_of_a_worker_that_is_gone_is_taken_on(desk: Desk) -> None:
    """A spool that nobody holds is put into the journal and removed; that of a living worker is left alone."""
    folder = Path(desk.host.config.data) / "spool"
    living = await SpoolFile.open(folder / "1-living.db", new=True)
    dead = await SpoolFile.open(folder / "2-dead.db", new=True)
    for number in range(3):
        for file, conversation in ((living, "later"), (dead, "now")):
            message = Message(f"m{number}", conversation, 0, "hello")
            await file.put(message, channel="", locale=None, door="http")[1]
    await dead.aclose()
    await answered(desk.http, desk.url, "now", 3)
    await wait_until(lambda: not (folder / "2-dead.db").exists(), "its file is gone", BACK_S)
    assert await kept_in(desk.http, desk.url, ["now", "later"]) == {"now": ["m0", "m1", "m2"], "later": []}
    await living.aclose()
    await answered(desk.http, desk.url, "later", 3)
    assert await kept_in(desk.http, desk.url, ["later"]) == {"later": ["m0", "m1", "m2"]}


async def test_a_spool_that_cant_be_read_stops_nobody(start_desk: StartDesk, reach: Reach, tmp_path: Path) -> None:
    """A file of another worker that is no spool is left as it is, and the host serves."""
    folder = tmp_path / "data" / "spool"
    folder.mkdir(parents=True)
    (folder / "0-dead.db").write_bytes(b"no database at all, however long one looks at it" * 100)
    desk = await start_desk({"talker.py": TALKER}, backend=reach.url, spool=True, data=tmp_path / "data")
    assert await desk.reply("hello") == "heard hello"
    assert (folder / "0-dead.db").read_bytes().startswith(b"no database")


async def start_host(folder: Path, reach: Reach) -> Server:
    """A host process with a spool."""
    (folder / "hotdesk.toml").write_text(f'backend = "{reach.url}"\nspool = true\nlog_level = "warning"\n')
    server = host_on(folder, {"talker.py": TALKER})
    await server.start()
    return server


async def test_a_kill_loses_nothing_and_doubles_nothing(reach: Reach, tmp_path: Path) -> None:
    """kill -9 while Redis is away, and again and again while the spool is emptied: each message once, in order."""
    names = [f"c{number}" for number in range(10)]
    sent: dict[str, list[str]] = {name: [] for name in names}
    server = await start_host(tmp_path, reach)
    url = f"http://127.0.0.1:{server.port}"
    async with aiohttp.ClientSession() as http:
        try:
            await reach.lose("cut off")
            for number in range(60):
                told = await asyncio.gather(*(post(http, url, name, id=f"{name}-{number}") for name in names))
                assert {(status, body["status"]) for status, body in told} == {(202, "spooled")}
                for name in names:
                    sent[name].append(f"{name}-{number}")
            await server.kill()
            await reach.find()
            reach.link.delay_s = 0.01
            for left in (400, 150):
                await server.start()
                await wait_until(lambda left=left: spooled_at_most(http, url, left), f"{left} are left", BACK_S)
                await server.kill()
                assert [path.name for path in (tmp_path / "data" / "spool").glob("*.db")] == ["host.db"]
            await server.start()
            reach.link.delay_s = 0.0
            for name in names:
                await answered(http, url, name, len(sent[name]))
            assert await kept_in(http, url, names) == sent
        finally:
            if server.running:
                await server.stop()


async def test_the_spool_of_a_killed_worker_goes_to_its_sibling(reach: Reach, tmp_path: Path) -> None:
    """Of two workers one is killed with messages in its spool: the other puts them into the journal, once, in order."""
    workers = WorkerDesk(tmp_path, reach.url, 2, env={"HOTDESK_SPOOL": "true"})
    workers.write("plugins/who.py", WHO)
    ids = [f"m{number}" for number in range(10)]
    async with starting(workers):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
            async with http.get(f"{workers.url}/p/who/") as response:
                pid = (await response.json())["pid"]
            await reach.lose("cut off")
            for id in ids:
                assert (await post(http, workers.url, "c", id=id))[1]["status"] == "spooled"
            async with http.get(f"{workers.url}/p/who/") as response:
                assert (await response.json())["pid"] == pid
            os.kill(pid, signal.SIGKILL)
        await reach.find()
        async with aiohttp.ClientSession() as http:
            await answered(http, workers.url, "c", len(ids))
            assert await kept_in(http, workers.url, ["c"]) == {"c": ids}
        assert workers.log_text().count("spool_taken_on") == 1


async def spooled_at_most(http: aiohttp.ClientSession, url: str, count: int) -> bool:
    """Whether no more than *count* messages are in the spool."""
    async with http.get(f"{url}/readyz") as response:
        left = (await response.json())["spooled"]
    return 0 < left <= count


def test_a_spool_beside_sqlite_is_a_wrong_setting(tmp_path: Path) -> None:
    """The start says so: that journal is on this machine's disk already."""
    with pytest.raises(ConfigError, match=r"'spool' is True .*redis"):
        load_config({"data": str(tmp_path)}, {"HOTDESK_SPOOL": "true"}, file=None)
    assert Config().spool is False
