"""Giving a turn up through the doors: by asking, or by leaving."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from tests.web.test_access import SECRET, token
from tests.web.visitors import assert_error_frame, open_desk, raw_socket, raw_stream, request_bytes, sse_events
from yarl import URL

from conftest import Desk, StartDesk, wait_until

STREAM = """
import asyncio, time
from hotdesk_sdk import hookimpl

NOTES = []

@hookimpl
async def respond(turn):
    if turn.text == "hold":
        NOTES.append("held")
        await hang()
    NOTES.append("asked")
    if turn.text.startswith("say"):
        yield "one "
        yield "two "
        NOTES.append("said")
    if turn.text != "short":
        await hang()
    yield "whole"

async def hang():
    try:
        await asyncio.sleep(60)
    finally:
        NOTES.append(time.monotonic())
"""


def notes(desk: Desk) -> list[Any]:
    generation = desk.host.plugins.entry("a").current
    assert generation is not None
    found: list[Any] = sys.modules[generation.module_name].NOTES
    return found


def closed_at(desk: Desk) -> float:
    """When what the bot waited for was closed; 0 while it is open."""
    return next((note for note in notes(desk) if isinstance(note, float)), 0.0)


def post_bytes(text: str, query: str = "", **headers: str) -> bytes:
    body = f'{{"text":"{text}","id":"m"}}'.encode()
    path = f"/v1/conversations/c/messages{query}"
    return request_bytes("POST", path, {"Content-Type": "application/json", **headers}, body)


async def cancel(desk: Desk, message: str = "m", conversation: str = "c", **options: Any) -> tuple[int, Any]:
    path = f"{quote(conversation, safe='')}/messages/{quote(message, safe='')}/cancel"
    url = URL(f"{desk.url}/v1/conversations/{path}", encoded=True)
    async with desk.http.post(url, **options) as response:
        return response.status, await response.json()


async def cut_reply(desk: Desk, text: str | None) -> None:
    """The record ends in a reply of *text* that is marked cut, or in the message."""
    await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    _, *replies = await desk.record()
    assert [(reply["text"], reply["metadata"]) for reply in replies] == (
        [] if text is None else [(text, {"cut": True, "cancelled": True})]
    )


# -- by asking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["wait", "say"])
async def test_a_cancel_by_post_ends_a_waiting_request(start_desk: StartDesk, text: str) -> None:
    """`?wait` is answered with the cut reply, or none, and the error `cancelled`; the cancel itself with 202."""
    desk = await start_desk({"a.py": STREAM})
    waiting = asyncio.ensure_future(desk.say(text, id="a/b ü"))
    await wait_until(lambda: ("said" if text == "say" else "asked") in notes(desk), "the bot is asked")
    at = time.monotonic()
    assert await cancel(desk, "a/b ü") == (202, {"id": "a/b ü", "status": "cancelling"})
    body = await waiting
    assert closed_at(desk) - at < 0.1
    assert body["error"]["code"] == "cancelled"
    assert [reply["text"] for reply in body["replies"]] == (["one two "] if text == "say" else [])
    status, answer = await cancel(desk, "a/b ü")
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert (await cancel(desk, "other"))[0] == 404


async def test_a_cancelled_event_stream_ends_with_done(start_desk: StartDesk) -> None:
    """A POST's events are its chunks, the cut reply, the error `cancelled`, and `done`."""
    desk = await start_desk({"a.py": STREAM})
    async with desk.http.post(
        f"{desk.url}/v1/conversations/c/messages",
        json={"text": "say", "id": "m"},
        headers={"Accept": "text/event-stream"},
    ) as response:
        events = sse_events(response)
        assert [(await anext(events)).kind for _ in range(3)] == ["accepted", "chunk", "chunk"]
        assert (await cancel(desk))[0] == 202
        rest = [event async for event in events]
    assert [event.kind for event in rest] == ["reply", "error", "done"]
    assert (rest[0].data["text"], rest[0].data["metadata"]["cut"], rest[1].data["code"]) == (
        "one two ",
        True,
        "cancelled",
    )


@pytest.mark.parametrize("text", ["wait", "say"])
async def test_a_cancel_frame(start_desk: StartDesk, text: str) -> None:
    """Over a WebSocket `cancel` ends the turn; every reader hears the cut reply and the error."""
    desk = await start_desk({"a.py": STREAM})
    async with (
        desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c") as ws,
        desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c") as other,
    ):
        await ws.send_json({"type": "message", "text": text, "id": "m"})
        assert (await ws.receive_json())["type"] == "accepted"
        await wait_until(lambda: ("said" if text == "say" else "asked") in notes(desk), "the bot is asked")
        at = time.monotonic()
        await ws.send_json({"type": "cancel", "to": "m"})
        for reader in (ws, other):
            frames = [await reader.receive_json() for _ in range(4 if text == "say" else 1)]
            assert [frame["type"] for frame in frames[:-1]] == ["chunk", "chunk", "reply"][: len(frames) - 1]
            assert_error_frame(frames[-1], "cancelled")
            assert frames[-1]["to"] == "m"
        assert closed_at(desk) - at < 0.1
    await cut_reply(desk, "one two " if text == "say" else None)


async def test_a_cancel_may_follow_its_message_at_once(start_desk: StartDesk) -> None:
    """Message and cancel in one packet: the turn is cancelled as soon as the message is on disk."""
    desk = await start_desk({"a.py": STREAM})
    async with desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c") as ws:
        for number in range(20):
            await asyncio.gather(
                ws.send_json({"type": "message", "text": "wait", "id": f"m{number}"}),
                ws.send_json({"type": "cancel", "to": f"m{number}"}),
            )
            assert (await ws.receive_json())["type"] == "accepted"
            assert_error_frame(await ws.receive_json(), "cancelled")
    assert desk.host.turns.live == 0


async def test_a_cancel_of_nothing_is_an_error_frame(start_desk: StartDesk) -> None:
    """An unknown or ended turn, or one of another conversation, is `not_found` with its `to`; no `to` is bad."""
    desk = await start_desk({"a.py": STREAM})
    await desk.say("short", id="m")
    waiting = asyncio.ensure_future(desk.say("wait", "other", id="o"))
    await wait_until(lambda: notes(desk).count("asked") == 2, "a turn runs elsewhere")
    async with desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c") as ws:
        for name in ("m", "never", "o"):
            await ws.send_json({"type": "cancel", "to": name})
            frame = await ws.receive_json()
            assert_error_frame(frame, "not_found")
            assert frame["to"] == name
        await ws.send_json({"type": "cancel"})
        assert_error_frame(await ws.receive_json(), "bad_message")
    assert not closed_at(desk)
    assert (await cancel(desk, "o", "other"))[0] == 202
    assert (await waiting)["error"]["code"] == "cancelled"


async def test_a_queued_message_is_cancelled_through_both_doors(start_desk: StartDesk) -> None:
    """A message that waits behind another is given up at once, and what it waits for is not touched."""
    desk = await start_desk({"a.py": STREAM})
    async with desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c") as ws:
        for name in ("first", "second", "third"):
            await ws.send_json({"type": "message", "text": "hold", "id": name})
            assert (await ws.receive_json())["id"] == name
        await ws.send_json({"type": "cancel", "to": "second"})
        frame = await ws.receive_json()
        assert (frame["code"], frame["to"]) == ("cancelled", "second")
        assert (await cancel(desk, "third"))[0] == 202
        assert (await ws.receive_json())["to"] == "third"
        assert notes(desk) == ["held"]
        assert (await cancel(desk, "first"))[0] == 202
        assert (await ws.receive_json())["to"] == "first"


async def test_only_the_conversations_own_visitor_cancels(start_desk: StartDesk) -> None:
    """With visitor tokens a cancel wants the token of its conversation."""
    desk = await start_desk({"a.py": STREAM}, visitor_tokens=True, visitor_secret=SECRET)
    own, other = ({"Authorization": f"Bearer {token(conversation)}"} for conversation in ("c", "d"))
    async with desk.http.post(
        f"{desk.url}/v1/conversations/c/messages", json={"text": "wait", "id": "m"}, headers=own
    ) as response:
        assert response.status == 202
    assert (await cancel(desk))[0] == 401
    assert (await cancel(desk, headers=other))[0] == 403
    assert (await cancel(desk, conversation="d", headers=other))[0] == 404
    assert not closed_at(desk)
    assert (await cancel(desk, headers=own))[0] == 202
    await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")


# -- by leaving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["wait", "stream", "websocket", "events"])
@pytest.mark.parametrize("text", ["wait", "say"])
async def test_who_leaves_cancels(start_desk: StartDesk, door: str, text: str) -> None:
    """With `on_leave = "cancel"` the turn is closed within 100 ms of its only visitor hanging up, at any door."""
    desk = await start_desk({"a.py": STREAM}, on_leave="cancel")
    async with raw_stream(desk.url) as (_, writer):
        if door == "websocket":
            writer.close()
            visitor = raw_socket(desk.url, "conversation=c")
            socket = await visitor.__aenter__()
            socket.say(text, id="m")
            hang_up = socket.writer.close
        else:
            hang_up = writer.close
            if door == "events":
                writer.write(request_bytes("GET", "/v1/conversations/c/events"))
                await wait_until(lambda: desk.host.metrics.connections.labels("sse")._value.get() == 1, "it listens")
                async with desk.http.post(
                    f"{desk.url}/v1/conversations/c/messages", json={"text": text, "id": "m"}
                ) as response:
                    assert response.status == 202
            elif door == "stream":
                writer.write(post_bytes(text, Accept="text/event-stream"))
            else:
                writer.write(post_bytes(text, "?wait=30"))
        await wait_until(lambda: ("said" if text == "say" else "asked") in notes(desk), "the bot is asked")
        at = time.monotonic()
        hang_up()
        await wait_until(lambda: closed_at(desk), "what the bot waited for is closed")
        assert closed_at(desk) - at < 0.1
    await cut_reply(desk, "one two " if text == "say" else None)


@pytest.mark.parametrize("door", ["wait", "stream", "websocket", "events"])
async def test_by_default_a_turn_runs_to_its_end(start_desk: StartDesk, door: str) -> None:
    """With `on_leave = "finish"` nobody's leaving ends a turn."""
    source = STREAM.replace("asyncio.sleep(60)", "asyncio.sleep(0.3)")
    desk = await start_desk({"a.py": source})
    async with raw_stream(desk.url) as (_, writer):
        if door == "websocket":
            async with raw_socket(desk.url, "conversation=c") as socket:
                socket.say("say", id="m")
                await wait_until(lambda: "said" in notes(desk), "the bot is asked")
        else:
            if door == "events":
                writer.write(request_bytes("GET", "/v1/conversations/c/events"))
                await wait_until(lambda: desk.host.metrics.connections.labels("sse")._value.get() == 1, "it listens")
                async with desk.http.post(
                    f"{desk.url}/v1/conversations/c/messages", json={"text": "say", "id": "m"}
                ) as response:
                    assert response.status == 202
            elif door == "stream":
                writer.write(post_bytes("say", Accept="text/event-stream"))
            else:
                writer.write(post_bytes("say", "?wait=30"))
            await wait_until(lambda: "said" in notes(desk), "the bot is asked")
    await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    assert (await desk.record())[1]["text"] == "one two whole"


@pytest.mark.parametrize("last", ["stream", "wait", "repeat", "websocket", "events"])
async def test_the_last_to_leave_cancels(start_desk: StartDesk, last: str) -> None:
    """While a reader, a stream or a wait is left, whichever, the turn goes on; with the last it ends."""
    desk = await start_desk({"a.py": STREAM}, on_leave="cancel")
    streams = desk.host.metrics.connections.labels("sse")._value
    async with contextlib.AsyncExitStack() as stack:
        socket = await stack.enter_async_context(raw_socket(desk.url, "conversation=c"))
        leave = {"websocket": socket.writer.close}
        for name, data in {
            "events": request_bytes("GET", "/v1/conversations/c/events"),
            "stream": post_bytes("say", Accept="text/event-stream"),
            "wait": post_bytes("say", "?wait=30"),
            "repeat": post_bytes("say", "?wait=30"),
        }.items():
            _, writer = await stack.enter_async_context(raw_stream(desk.url))
            writer.write(data)
            leave[name] = writer.close
            if name == "stream":
                await wait_until(lambda: "said" in notes(desk), "the bot is asked")
        turn = desk.host.turns.find("c", "m")
        assert turn is not None
        await wait_until(lambda: turn.waiting == 2 and streams.get() == 2, "all are there")

        def present() -> int:
            sockets = desk.host.metrics.registry.get_sample_value("hotdesk_websockets") or 0
            return turn.waiting + int(streams.get() + sockets)

        left = [*(name for name in leave if name != last), last]
        for count, name in enumerate(left[:-1], 1):
            leave[name]()
            await wait_until(lambda count=count: present() == 5 - count, f"{name} has left")
            assert not turn.clock.cancelled
        leave[last]()
        await wait_until(lambda: closed_at(desk), "the turn is cancelled")
    await cut_reply(desk, "one two ")


@pytest.mark.parametrize("door", ["wait", "stream", "websocket"])
async def test_who_leaves_at_once_cancels(start_desk: StartDesk, door: str) -> None:
    """A visitor who says something and hangs up before it is accepted, or just then, is waited for by nobody."""
    desk = await start_desk({"a.py": STREAM}, on_leave="cancel")
    for _ in range(10):
        taken = desk.host.metrics.messages.labels({"wait": "http", "stream": "sse"}.get(door, door))._value
        before = taken.get()
        if door == "websocket":
            async with raw_socket(desk.url, "conversation=c") as socket:
                socket.say("wait")
                socket.writer.close()
                await wait_until(lambda taken=taken, before=before: taken.get() > before, "it is accepted")
        else:
            async with raw_stream(desk.url) as (_, writer):
                query, headers = ("?wait=30", {}) if door == "wait" else ("", {"Accept": "text/event-stream"})
                writer.write(post_bytes("wait", query, **headers).replace(b',"id":"m"', b"         "))
                writer.close()
                await wait_until(lambda taken=taken, before=before: taken.get() > before, "it is accepted")
        at = time.monotonic()
        await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
        assert time.monotonic() - at < 0.3


async def test_who_never_listened_does_not_leave(start_desk: StartDesk) -> None:
    """A message answered 202, and one whose `?wait` was over, run to their end though nobody is there."""
    source = STREAM.replace("asyncio.sleep(60)", "asyncio.sleep(0.5)")
    desk = await start_desk({"a.py": source}, on_leave="cancel")
    for name, query in (("plain", {}), ("waited", {"wait": "0.1"})):
        async with desk.http.post(
            f"{desk.url}/v1/conversations/{name}/messages", json={"text": "say"}, params=query
        ) as response:
            assert response.status == 202
    async with raw_socket(desk.url, "conversation=elsewhere"):
        await wait_until(lambda: notes(desk).count("said") == 2, "both are answered")
    await wait_until(lambda: desk.host.turns.live == 0, "the turns ended")
    for name in ("plain", "waited"):
        assert (await desk.record(name))[1]["text"] == "one two whole"


async def test_a_stop_is_not_a_leave(tmp_path: Path) -> None:
    """A host that stops closes its visitors, whose turns stay in the journal and run at the next start."""
    async with aiohttp.ClientSession() as visitor:
        context = open_desk(tmp_path, {"a.py": STREAM}, on_leave="cancel", stop_timeout_s=0.3)
        desk = await context.__aenter__()
        async with visitor.ws_connect(f"{desk.url}/v1/ws?conversation=c") as ws:
            await ws.send_json({"type": "message", "text": "say", "id": "m"})
            await wait_until(lambda: "said" in notes(desk), "the bot is asked")
            await context.__aexit__(None, None, None)
    async with open_desk(tmp_path, {"a.py": STREAM.replace("await hang()", "pass")}) as desk:
        assert desk.host.resumed == 1
        await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
        [_, reply] = await desk.record()
        assert (reply["text"], reply["metadata"]) == ("one two whole", {})
