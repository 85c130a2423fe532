"""A visitor who leaves, or says so, costs nothing more: the model's connection is closed within 100 ms."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from model_server import ModelServer, Script
from tests.llm.asking import ASKED, settings_of

from conftest import Desk, StartDesk, wait_until
from hotdesk.config import LlmSettings
from hotdesk.llm.client import Llm
from hotdesk_sdk import LlmError

PLUGINS = Path(__file__).parents[2] / "plugins"
CHATGPT = {name: (PLUGINS / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}
WORDS = " ".join(f"word{number}" for number in range(200))

SLOW_HEADERS = Script(delay_s=30, text="late")
SLOW_TOKEN = Script(first_s=30, keepalive_s=0.02, text="late")
SPEAKS = Script(text=WORDS, gap_s=0.02)
FAILS = Script(status=503, headers={"retry-after-ms": "30000"}, error={"error": {"message": "later"}})

PHASES = ("queued", "connecting", "before the first token", "mid-stream", "in backoff", "in fallback")


async def desk_in(
    phase: str, start_desk: StartDesk, server: ModelServer, **config: Any
) -> tuple[Desk, Callable[[], bool]]:
    """A desk whose next turn gets into *phase*, and what tells that it is there."""
    models = {"default": settings_of(server.base_url, concurrency=1 if phase == "queued" else 100)}
    llm = LlmSettings(models=models)
    there: Callable[[], bool]
    if phase == "queued":
        server.default = SPEAKS
    elif phase == "in fallback":
        models["other"] = settings_of(server.base_url)
        models["default"] = settings_of(server.base_url, retries=0)
        llm = LlmSettings(models=models, fallback=("other",))
        server.next(Script(status=401, error={"error": {"message": "no"}}))
        server.default = SLOW_TOKEN
    else:
        server.default = {
            "connecting": SLOW_HEADERS,
            "before the first token": SLOW_TOKEN,
            "mid-stream": SPEAKS,
            "in backoff": FAILS,
        }[phase]
    desk = await start_desk(dict(CHATGPT), llm=llm, stop_timeout_s=0.2, **config)
    if phase == "queued":
        async with desk.http.post(f"{desk.url}/v1/conversations/other/messages", json={"text": "first"}) as response:
            assert response.status == 202
        await wait_until(lambda: server.open == 1, what="the only place is taken")
    if phase == "queued":
        there = lambda: gauge(desk, "hotdesk_llm_waiting") == 1  # noqa: E731
    elif phase == "in backoff":
        there = lambda: retries(desk) == 1 and server.open == 0  # noqa: E731
    elif phase == "in fallback":
        there = lambda: len(server.requests) == 2 and server.open == 1  # noqa: E731
    elif phase == "mid-stream":
        there = lambda: server.open == 1 and server.requests[-1].content > 3  # noqa: E731
    else:
        there = lambda: server.open == 1  # noqa: E731
    return desk, there


def gauge(desk: Desk, name: str) -> float:
    value = desk.host.metrics.registry.get_sample_value(name)
    assert value is not None
    return value


def retries(desk: Desk) -> float:
    return desk.host.metrics.registry.get_sample_value("hotdesk_llm_retries_total", {"model": "default"}) or 0.0


async def gone(desk: Desk, server: ModelServer, phase: str, since: float) -> None:
    """The turn is given up, and its request with it, within 100 ms (ten times that on a busy machine)."""
    left = 1 if phase == "queued" else 0
    await wait_until(lambda: gauge(desk, "hotdesk_turns_live") == left, what="the turn is given up")
    await wait_until(lambda: server.open == left, what="the model's connection is closed")
    assert time.monotonic() - since < 1.0
    asked = server.requests
    if phase == "queued":
        assert len(asked) == 1  # nothing was ever asked for it
    elif phase == "in backoff":
        assert [seen.hung_up for seen in asked] == [None]
    else:
        hung_up = asked[-1].hung_up
        assert hung_up is not None
        assert hung_up - since < 0.1
        assert not asked[-1].finished
    count = len(asked)
    await asyncio.sleep(0.05)
    assert len(server.requests) == count  # and nothing is asked anew


@pytest.mark.parametrize("phase", PHASES)
async def test_a_cancel_hangs_up_on_the_model(phase: str, start_desk: StartDesk, model_server: ModelServer) -> None:
    """`cancel` over a WebSocket, in every phase of a request; what was said is the reply, marked cut."""
    desk, there = await desk_in(phase, start_desk, model_server)
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c"}) as ws:
        await ws.send_json({"type": "message", "id": "m", "text": "hello"})
        await wait_until(there, what=phase)
        since = time.monotonic()
        await ws.send_json({"type": "cancel", "to": "m"})
        await gone(desk, model_server, phase, since)
        frames = []
        while not frames or frames[-1]["type"] != "error":
            frames.append(await ws.receive_json(timeout=5))
    assert frames[-1]["code"] == "cancelled"
    said = "".join(frame["text"] for frame in frames if frame["type"] == "chunk")
    replies = [frame for frame in frames if frame["type"] == "reply"]
    assert [reply["text"] for reply in replies] == ([said] if said else [])
    assert bool(said) == (phase == "mid-stream")
    for reply in replies:
        assert reply["metadata"]["cut"] is True
    assert (await desk.plugin("chatgpt"))["failures"] == 0


@pytest.mark.parametrize("door", ["websocket", "sse", "wait"])
@pytest.mark.parametrize("phase", PHASES)
async def test_who_leaves_hangs_up_on_the_model(
    phase: str, door: str, start_desk: StartDesk, model_server: ModelServer
) -> None:
    """With `on_leave = "cancel"`, whichever way the visitor waited."""
    desk, there = await desk_in(phase, start_desk, model_server, on_leave="cancel")
    async with aiohttp.ClientSession() as visitor:
        if door == "websocket":
            ws = await visitor.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c"})
            await ws.send_json({"type": "message", "id": "m", "text": "hello"})
            asking = None
        else:
            asking = asyncio.create_task(ask(visitor, desk, door))
        await wait_until(there, what=phase)
        since = time.monotonic()
        if asking is not None:
            asking.cancel()
            await asyncio.wait({asking})
        await visitor.close()
        await gone(desk, model_server, phase, since)
    if phase == "mid-stream":
        [_, reply] = await desk.record()
        assert reply["metadata"]["cut"] is True
        assert WORDS.startswith(reply["text"])


async def ask(visitor: aiohttp.ClientSession, desk: Desk, door: str) -> None:
    url = f"{desk.url}/v1/conversations/c/messages"
    headers = {"Accept": "text/event-stream"} if door == "sse" else {}
    params = {"wait": "60"} if door == "wait" else {}
    async with visitor.post(url, json={"text": "hello", "id": "m"}, headers=headers, params=params) as response:
        await response.read()


async def test_who_leaves_is_answered_all_the_same_by_default(start_desk: StartDesk, model_server: ModelServer) -> None:
    """`on_leave = "finish"`: the reply is in the record, whole."""
    model_server.default = Script(text="one two three four five six", gap_s=0.02)
    desk = await start_desk(dict(CHATGPT), llm=LlmSettings(models={"default": settings_of(model_server.base_url)}))
    async with aiohttp.ClientSession() as visitor:
        asking = asyncio.create_task(ask(visitor, desk, "sse"))
        await wait_until(lambda: model_server.open == 1, what="it is asked")
        asking.cancel()
        await asyncio.wait({asking})
    await wait_until(lambda: gauge(desk, "hotdesk_turns_live") == 0, what="the turn has ended")
    [_, reply] = await desk.record()
    assert reply["text"] == "one two three four five six"
    assert model_server.requests[-1].finished


async def test_when_nobody_can_take_more_the_model_waits(start_desk: StartDesk, model_server: ModelServer) -> None:
    """Back-pressure reaches the model's own socket, and no further than some megabytes are held anywhere."""
    pieces = ["x" * 8192] * 4000
    model_server.default = Script(pieces=pieces)
    desk = await start_desk(
        dict(CHATGPT),
        llm=LlmSettings(models={"default": settings_of(model_server.base_url)}),
        max_reply_chars=64 * 1024 * 1024,
        reader_stall_s=3.0,
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", int(desk.url.rpartition(":")[2]), limit=4096)
    writer.write(
        b"GET /v1/ws?conversation=c HTTP/1.1\r\nHost: desk\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    async with desk.http.post(f"{desk.url}/v1/conversations/c/messages", json={"text": "go", "id": "m"}) as response:
        assert response.status == 202
    await wait_until(lambda: model_server.open == 1, what="it is asked")
    seen = model_server.requests[-1]
    sent = -1
    while seen.sent != sent:  # it comes to a stand: the visitor reads nothing
        sent = seen.sent
        await asyncio.sleep(0.3)
    assert 0 < sent < len(pieces)
    assert model_server.open == 1
    await wait_until(lambda: seen.finished, what="the reader was let go, and the rest was read", timeout_s=20)
    writer.close()
    await wait_until(lambda: gauge(desk, "hotdesk_turns_live") == 0, what="the turn has ended")
    assert (await desk.record())[-1]["text"] == "".join(pieces)


async def test_a_closed_host_hangs_up_on_everybody(model_server: ModelServer, open_models: Any) -> None:
    """Closing the models ends what is under way, with an error and not with silence, and nobody is asked again."""
    model_server.default = SLOW_TOKEN
    llm: Llm = await open_models(model_server.base_url)
    stream = llm.stream(ASKED)
    pulling = asyncio.create_task(stream.next_batch())
    await wait_until(lambda: model_server.open == 1, what="it is asked")
    await llm.aclose()
    with pytest.raises(LlmError, match="the host closes it"):
        async with asyncio.timeout(10):
            await pulling
    await wait_until(lambda: model_server.open == 0, what="the connection is closed")
    assert len(model_server.requests) == 1
