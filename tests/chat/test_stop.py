"""A stop finishes what it can within its time; the rest is in the journal and runs at the next start, once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import structlog
from tests.web.visitors import open_desk, sse_events

from conftest import Desk, echo, wait_until

SLOW = """
import asyncio
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    with open({log!r}, "a") as log:
        log.write(f"{{turn.text}} begins\\n")
    await asyncio.sleep(float(turn.text))
    return f"slept {{turn.text}}"
"""

DEAF = """
import asyncio
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    open("begun", "w").close()
    for _ in range(600):
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            pass
"""

DEAF_WITHOUT_GLOBALS = DEAF.replace(
    "    for _", "    sleep, cancelled = asyncio.sleep, asyncio.CancelledError\n    for _"
)
DEAF_WITHOUT_GLOBALS = DEAF_WITHOUT_GLOBALS.replace("await asyncio.sleep", "await sleep").replace(
    "except asyncio.CancelledError", "except cancelled"
)


def slow(home: Path) -> dict[str, str]:
    return {"slow.py": SLOW.format(log=str(home / "log"))}


async def send(desk: Desk, text: str, conversation: str = "c", **query: str) -> tuple[int, dict[str, Any]]:
    async with desk.http.post(
        f"{desk.url}/v1/conversations/{conversation}/messages", json={"text": text, "id": f"m{text}"}, params=query
    ) as response:
        return response.status, await response.json()


async def texts(desk: Desk, conversation: str = "c") -> list[str]:
    return [entry["text"] for entry in await desk.record(conversation)]


@contextlib.asynccontextmanager
async def stopping_later(home: Path, **config: Any) -> Any:
    """A desk whose host can be stopped while the visitor's own session stays open."""
    async with aiohttp.ClientSession() as visitor:
        context = open_desk(home, **config)
        desk = await context.__aenter__()
        await desk.http.close()
        desk.http = visitor
        stopped = False

        async def stop() -> float:
            nonlocal stopped
            stopped = True
            started = time.monotonic()
            await context.__aexit__(None, None, None)
            return time.monotonic() - started

        try:
            yield desk, stop
        finally:
            if not stopped:
                await stop()


async def test_a_stop_finishes_what_runs(tmp_path: Path) -> None:
    """Turns under way end before the host does, those that wait behind them too, and their visitors get the answer."""
    async with stopping_later(tmp_path, plugins=slow(tmp_path)) as (desk, stop):
        waiting = [asyncio.ensure_future(send(desk, text, wait="10")) for text in ("0.3", "0.2", "0.1")]
        await wait_until(lambda: desk.host.turns.live == 3, "three turns are accepted")
        with structlog.testing.capture_logs() as logs:
            await stop()
        assert [line for line in logs if line["event"] == "stop_timed_out"] == []
        answers = [await answer for answer in waiting]
    assert [status for status, _ in answers] == [200, 200, 200]
    async with open_desk(tmp_path) as desk:
        assert desk.host.resumed == 0
        assert sorted(await texts(desk)) == sorted(["0.3", "0.2", "0.1", "slept 0.3", "slept 0.2", "slept 0.1"])


async def test_what_does_not_finish_runs_once_at_the_next_start(tmp_path: Path) -> None:
    """A turn that outlasts stop_timeout stays in the journal; the next start runs it, and there is one reply."""
    async with stopping_later(tmp_path, plugins=slow(tmp_path), stop_timeout_s=0.3) as (desk, stop):
        assert (await send(desk, "30"))[0] == 202
        assert (await send(desk, "0"))[0] == 202
        await wait_until(lambda: (tmp_path / "log").exists(), "the turn has begun")
        with structlog.testing.capture_logs() as logs:
            took = await stop()
    assert took < 4
    [said] = [line for line in logs if line["event"] == "stop_timed_out"]
    assert (said["left_open"], said["waited_for_elsewhere"]) == (2, 0)
    async with open_desk(tmp_path, {"slow.py": echo(2)}) as desk:
        assert desk.host.resumed == 2
        await wait_until(lambda: desk.host.turns.live == 0, "the turns ended")
        assert await texts(desk) == ["30", "0", "2: 30", "2: 0"]
        assert (await desk.say("x", id="m30"))["replies"][0]["text"] == "2: 30"
    async with open_desk(tmp_path) as desk:
        assert desk.host.resumed == 0
        assert len(await texts(desk)) == 4


async def test_who_waits_is_told_that_the_host_stops(tmp_path: Path) -> None:
    """At a stop that can't finish, `?wait` becomes 202 and a turn's events end with the error `stopping`."""
    async with stopping_later(tmp_path, plugins=slow(tmp_path), stop_timeout_s=0.3) as (desk, stop):

        async def streamed() -> list[str]:
            headers = {"Accept": "text/event-stream"}
            url = f"{desk.url}/v1/conversations/d/messages"
            async with desk.http.post(url, json={"text": "30"}, headers=headers) as response:
                return [event.data.get("code", event.kind) async for event in sse_events(response)]

        async def listening() -> list[str]:
            async with desk.http.get(f"{desk.url}/v1/conversations/c/events", params={"after": "0"}) as response:
                return [event.kind async for event in sse_events(response)]

        async def connected() -> Any:
            async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "e"}) as ws:
                return (await ws.receive()).data

        waiting = asyncio.ensure_future(send(desk, "30", wait="60"))
        streaming = asyncio.ensure_future(streamed())
        listener = asyncio.ensure_future(listening())
        socket = asyncio.ensure_future(connected())
        await wait_until(lambda: desk.host.turns.live == 2, "two turns are accepted")
        await wait_until(
            lambda: desk.host.metrics.registry.get_sample_value("hotdesk_websockets") == 1, "the socket is open"
        )
        assert await stop() < 4
        assert await socket == 1012
        assert (await waiting)[0] == 202
        assert await streaming == ["accepted", "stopping"]
        assert await listener == ["message"]


async def test_a_stop_refuses_new_messages(tmp_path: Path) -> None:
    """While it finishes, the host refuses messages with `stopping` and Retry-After on every door."""
    async with stopping_later(tmp_path, plugins=slow(tmp_path)) as (desk, stop):
        await send(desk, "0.5")
        async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c"}) as ws:
            stopped = asyncio.ensure_future(stop())
            await wait_until(lambda: not desk.host.intake.ready, "the stop has begun")
            async with desk.http.post(f"{desk.url}/v1/conversations/c/messages", json={"text": "0"}) as response:
                assert response.status == 503
                assert response.headers["Retry-After"]
                assert (await response.json())["error"]["code"] == "stopping"
            await ws.send_json({"type": "message", "id": "m", "text": "0"})
            frame = await ws.receive_json()
            assert (frame["type"], frame["code"], frame["to"]) == ("error", "stopping", "m")
            assert (await ws.receive_json())["text"] == "slept 0.5"
        await stopped


@pytest.mark.parametrize(
    "source",
    [DEAF, DEAF_WITHOUT_GLOBALS],
    ids=["with_globals", "without_globals"],
)
async def test_a_plugin_that_ignores_cancellation_does_not_hold_the_stop(tmp_path: Path, source: str) -> None:
    """A plugin that swallows its cancellation costs the stop a bounded time; its turn runs at the next start, once."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "deaf.py").write_text(source)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hotdesk", "run", "--port", "0", "--json", cwd=tmp_path, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL, env={**os.environ, "HOTDESK_STOP_TIMEOUT_S": "0.3"},
    )  # fmt: skip
    try:
        port = await wait_until(lambda: listening_port(process.pid), "the host listens")
        async with aiohttp.ClientSession() as visitor:
            url = f"http://127.0.0.1:{port}/v1/conversations/c/messages"
            async with visitor.post(url, json={"text": "hello", "id": "m"}) as response:
                assert response.status == 202
        await wait_until((tmp_path / "begun").exists, "the turn has begun")
        process.terminate()
        await asyncio.wait_for(process.communicate(), 10)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    async with open_desk(tmp_path, {"deaf.py": echo(1)}) as desk:
        assert desk.host.resumed == 1
        await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
        assert await texts(desk) == ["hello", "1: hello"]


def listening_port(pid: int) -> int | None:
    found = [c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return found[0] if found else None
