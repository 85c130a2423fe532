"""Redis is killed, frozen or cut off: doors say so at once, promise nothing false, and it all comes back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
from tests.hosts.away import WAYS, Reach, post
from tests.hosts.conftest import TALKER
from tests.hosts.test_two_hosts import open_gate, turn_runs
from tests.redis_servers import RedisServer
from tests.web.test_promises import connect, next_frame
from tests.web.visitors import sse_events

from conftest import Desk, StartDesk, wait_until
from hotdesk.backend import redis as redis_backend

AT_ONCE_S = 0.8
"""For an answer that takes some milliseconds. A try to connect to a server that is frozen takes a second."""

MANY_TRIES_S = 0.6
"""Meanwhile the host tries several times to connect again: nobody is to wait for that."""

BACK_S = 20.0
"""For what takes two seconds at the most."""


@pytest.fixture
async def reach(own_redis: RedisServer) -> AsyncIterator[Reach]:
    async with Reach.to(own_redis) as reach:
        yield reach


async def ready(desk: Desk) -> tuple[int, dict[str, Any]]:
    async with desk.http.get(f"{desk.url}/readyz") as response:
        return response.status, await response.json()


async def healthy(desk: Desk) -> bool:
    async with desk.http.get(f"{desk.url}/healthz") as response:
        return response.status == 200


async def is_taken(desk: Desk, conversation: str, id: str) -> bool:
    return (await post(desk.http, desk.url, conversation, id=id))[0] == 202


@pytest.mark.parametrize("way", WAYS)
async def test_every_door_says_so_and_all_is_well_afterwards(start_desk: StartDesk, reach: Reach, way: str) -> None:
    """503 with Retry-After, at once from the second on; then new messages, held answers and readers go on."""
    desk = await start_desk({"talker.py": TALKER}, backend=reach.url)
    first = await desk.say("hello")
    waiting = asyncio.ensure_future(desk.say("wait x", "held", id="held"))
    await turn_runs(desk, "held", "held")
    heard: list[int] = []

    async def listen() -> None:
        async with desk.http.get(f"{desk.url}/v1/conversations/c/events?after=0") as response:
            async for event in sse_events(response):
                heard.append(event.data["seq"])  # noqa: PERF401 - it is looked at while it grows

    listening = asyncio.ensure_future(listen())
    await wait_until(lambda: heard == [1, 2], "the reader has heard what was")
    async with connect(desk) as ws:
        await reach.lose(way)
        await open_gate(desk, "x")
        assert await refusal(desk, "unsure", "u") == "backend_unavailable"
        async with asyncio.timeout(AT_ONCE_S):
            await ws.send_json({"type": "message", "id": "w", "text": "hello"})
            frame = await next_frame(ws, "error")
            assert (frame["code"], frame["to"]) == ("backend_unavailable", "w")
            assert "can't be reached" in frame["message"], "where Redis is, is not told to visitors"
            assert "127.0.0.1" not in frame["message"]
            assert await healthy(desk)
        tries_end = asyncio.get_running_loop().time() + MANY_TRIES_S
        while asyncio.get_running_loop().time() < tries_end:
            async with asyncio.timeout(AT_ONCE_S):
                assert await refusal(desk, "n", "m") == "backend_unavailable"
        async with desk.http.get(f"{desk.url}/v1/conversations/c/messages") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
        status, body = await ready(desk)
        assert (status, body["status"]) == (503, "not ready")
        assert body["problem"].startswith("backend redis://")
        assert not waiting.done()
        await reach.find()
        await wait_until(lambda: is_taken(desk, "c", "back"), "messages are taken again", BACK_S)
        assert [reply["text"] for reply in (await waiting)["replies"]] == ["heard wait x"]
        assert (await next_frame(ws, "reply"))["to"] == "back"
        await wait_until(lambda: len(heard) >= 4, "the reader goes on", BACK_S)
        assert (await ready(desk))[0] == 200
    listening.cancel()
    record = await desk.record()
    assert heard == [1, 2, 3, 4]
    assert [entry["id"] for entry in record if entry["type"] == "message"] == [first["id"], "back"]
    assert len(await desk.record("held")) == 2
    assert (await desk.say("again", "unsure", id="u"))["seq"] == 1
    assert len(await desk.record("unsure")) == 2


async def refusal(desk: Desk, conversation: str, id: str) -> str:
    """The code that a message is refused with."""
    status, body = await post(desk.http, desk.url, conversation, id=id)
    assert status == 503
    assert set(body["error"]) == {"code", "message"}
    return str(body["error"]["code"])


async def test_a_reader_that_came_meanwhile_catches_up(
    start_desk: StartDesk, reach: Reach, caplog: pytest.LogCaptureFixture
) -> None:
    """An event stream that is opened while Redis is away has everything afterwards; the log has two lines of it."""
    desk = await start_desk({"talker.py": TALKER}, backend=reach.url)
    await desk.say("one")
    await desk.say("two")
    await reach.lose("cut off")
    heard: list[int] = []

    async def listen() -> None:
        async with desk.http.get(f"{desk.url}/v1/conversations/c/events?after=1") as response:
            assert response.status == 200
            async for event in sse_events(response):
                heard.append(event.data["seq"])  # noqa: PERF401 - it is looked at while it grows

    listening = asyncio.ensure_future(listen())
    with structlog.testing.capture_logs() as logs:
        assert (await post(desk.http, desk.url, "c"))[0] == 503
        await wait_until(lambda: [log for log in logs if log["event"] == "backend_away"], "the operator is told")
        await reach.find()
        await wait_until(lambda: len(heard) >= 3, "the reader has caught up", BACK_S)
        await wait_until(lambda: [log for log in logs if log["event"] == "backend_back"], "the operator is told again")
    told = [log for log in logs if log["event"] in ("backend_away", "backend_back")]
    assert [log["event"] for log in told] == ["backend_away", "backend_back"]
    assert told[0]["problem"]
    await wait_until(lambda: is_taken(desk, "c", "m"), "messages are taken again", BACK_S)
    await wait_until(lambda: len(heard) >= 5, "the reader goes on", BACK_S)
    listening.cancel()
    assert heard == [2, 3, 4, 5, 6]
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_what_is_unsafe_is_said_at_the_start_and_to_probes(start_desk: StartDesk) -> None:
    """An fsync that is not always and an eviction of keys are each one line of the log, and stand in /readyz."""
    async with RedisServer(appendfsync="everysec", maxmemory_policy="allkeys-lru") as server:
        with structlog.testing.capture_logs() as logs:
            desk = await start_desk(backend=server.url)
        told = [line["problem"] for line in logs if line["event"] == "backend_unsafe"]
        body = (await ready(desk))[1]
        assert body["warnings"] == told
        assert [problem.split(" is ")[0] for problem in told] == ["appendfsync", "maxmemory-policy"]
        assert "everysec" in body["durability"]


async def test_what_becomes_unsafe_later_is_said_too(
    start_desk: StartDesk, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has Redis sync once a second: the log and /readyz say so without a restart."""
    monkeypatch.setattr(redis_backend, "LOOK_S", 0.1)
    desk = await start_desk(backend=own_redis.url)
    assert "warnings" not in (await ready(desk))[1]
    with structlog.testing.capture_logs() as logs:
        await own_redis.command("CONFIG", "SET", "appendfsync", "everysec")

        async def is_told() -> bool:
            return "everysec" in str((await ready(desk))[1].get("warnings"))

        await wait_until(is_told, "probes are told")
    assert [log["event"] for log in logs if log["event"] == "backend_unsafe"] == ["backend_unsafe"]
    assert "everysec" in (await ready(desk))[1]["durability"]


async def test_a_safe_redis_has_no_warnings(start_desk: StartDesk, own_redis: RedisServer) -> None:
    """With appendfsync always and no eviction there is nothing to warn of."""
    with structlog.testing.capture_logs() as logs:
        desk = await start_desk(backend=own_redis.url)
    assert [line for line in logs if line["event"] == "backend_unsafe"] == []
    body = (await ready(desk))[1]
    assert "warnings" not in body
    assert body["durability"] == "redis appendfsync always: accepted is on disk"
