"""A reader that does not read: it is let go within its bound, it can come back, and nobody else feels it."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tracemalloc
from pathlib import Path

import aiohttp
from tests.web.visitors import open_desk, raw_socket, raw_stream, request_bytes, sse_events

from conftest import Desk, StartDesk, wait_until

BIG = """
import asyncio
from hotdesk_sdk import hookimpl

@hookimpl
async def respond(turn):
    kind, _, size = turn.text.partition(" ")
    if kind == "big":
        return "x" * int(size)
    if kind == "stream":
        return chunks(int(size))
    return "small"

async def chunks(count):
    for number in range(count):
        await asyncio.sleep(0)
        yield "y" * 20_000
"""

BOUND = 64 * 1024
SIZE = 20_000
COUNT = 800


def slow_readers(desk: Desk, door: str) -> float:
    return desk.host.metrics.registry.get_sample_value("hotdesk_slow_readers_total", {"door": door}) or 0.0


async def say_big(desk: Desk, count: int) -> None:
    """*count* replies of SIZE characters in conversation c, 16 turns under way at a time."""
    for _ in range(count // 16):
        await asyncio.gather(*(desk.say(f"big {SIZE}") for _ in range(16)))


async def read_replies(desk: Desk, count: int) -> list[int]:
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c", "after": "0"}) as ws:
        return [(await ws.receive_json(timeout=30))["seq"] for _ in range(count)]


async def test_a_stalled_websocket_is_told_to_come_back(start_desk: StartDesk) -> None:
    """A socket that does not read is closed with 1013; reading again and coming back with `after=` misses nothing."""
    desk = await start_desk({"big.py": BIG}, max_buffer_bytes=BOUND, max_reply_chars=10_000_000)
    async with raw_socket(desk.url, "conversation=c&after=0", receive_buffer=4096) as stalled:
        await say_big(desk, COUNT)
        await wait_until(lambda: slow_readers(desk, "websocket") == 1, "the stalled reader is noticed")
        assert await stalled.close_code() == 1013
    assert len(await read_replies(desk, COUNT)) == COUNT


async def test_others_do_not_feel_a_stalled_websocket(start_desk: StartDesk) -> None:
    """Beside a stalled socket the other reader gets everything, other conversations are answered, memory is bounded."""
    desk = await start_desk({"big.py": BIG}, max_buffer_bytes=BOUND, max_reply_chars=10_000_000)
    slowest = 0.0

    async def elsewhere() -> None:
        nonlocal slowest
        while slow_readers(desk, "websocket") < 5 or slowest == 0:
            started = time.monotonic()
            assert await desk.reply("hi", "elsewhere") == "small"
            slowest = max(slowest, time.monotonic() - started)

    tracemalloc.start()
    try:
        async with asyncio.TaskGroup() as group:
            sockets = [raw_socket(desk.url, "conversation=c&after=0", receive_buffer=4096) for _ in range(5)]
            for stalled in sockets:
                await stalled.__aenter__()
            reading = group.create_task(read_replies(desk, COUNT))
            group.create_task(elsewhere())
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            await say_big(desk, COUNT)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    seqs = reading.result()
    assert len(seqs) == COUNT
    assert seqs == sorted(set(seqs))
    assert slowest < 2.0
    assert peak < COUNT * SIZE  # five of them would hold five times that
    await wait_until(
        lambda: desk.host.metrics.registry.get_sample_value("hotdesk_websockets") == 0, "the stalled ones are gone"
    )
    for stalled in sockets:
        await stalled.__aexit__(None, None, None)


async def test_a_stalled_event_stream_is_cut(start_desk: StartDesk) -> None:
    """An event stream that is not read is cut at its bound, and Last-Event-ID gives the rest."""
    desk = await start_desk({"big.py": BIG}, max_buffer_bytes=BOUND, max_reply_chars=10_000_000)
    async with raw_stream(desk.url, 4096) as (reader, writer):
        writer.write(request_bytes("GET", "/v1/conversations/c/events?after=0"))
        await wait_until(lambda: desk.host.metrics.connections.labels("sse")._value.get() == 1, "the stream is open")
        reading = asyncio.ensure_future(read_replies(desk, COUNT))
        await say_big(desk, COUNT)
        await wait_until(lambda: slow_readers(desk, "sse") == 1, "the stalled reader is let go")
        assert len(await reading) == COUNT
        try:
            while await asyncio.wait_for(reader.read(65536), 10):
                pass
        except ConnectionError:
            pass  # cut; what was on its way may have got here or not
    async with desk.http.get(f"{desk.url}/v1/conversations/c/events", headers={"Last-Event-ID": "10"}) as response:
        events = sse_events(response)
        assert (await anext(events)).id == 11


async def test_a_stalled_post_stream_is_cut_and_its_turn_goes_on(start_desk: StartDesk) -> None:
    """A visitor who does not read its own stream is cut; the turn ends all the same, and its reply is kept."""
    desk = await start_desk({"big.py": BIG}, max_buffer_bytes=BOUND, max_reply_chars=10_000_000)
    async with raw_stream(desk.url, 4096) as (_, writer):
        headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
        writer.write(request_bytes("POST", "/v1/conversations/c/messages", headers, b'{"text":"stream 400"}'))
        await wait_until(lambda: slow_readers(desk, "sse") == 1, "the stalled reader is let go")
        await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    entries = await desk.host.backend.read("c", 0, 10)
    assert entries is not None
    assert len(entries[1].text) == 400 * 20_000


async def test_a_long_backlog_is_read_at_the_readers_pace(start_desk: StartDesk) -> None:
    """A reader that reads gets a backlog far over the bound in one go, through a socket and as events."""
    desk = await start_desk({"big.py": BIG}, max_buffer_bytes=BOUND, max_reply_chars=10_000_000)
    await say_big(desk, COUNT)
    assert len(await read_replies(desk, COUNT)) == COUNT
    async with desk.http.get(f"{desk.url}/v1/conversations/c/events", params={"after": "0"}) as response:
        events = sse_events(response)
        assert [(await anext(events)).id for _ in range(2 * COUNT)] == list(range(1, 2 * COUNT + 1))
    assert slow_readers(desk, "websocket") == slow_readers(desk, "sse") == 0


async def test_one_reply_over_the_bound_reaches_its_reader(start_desk: StartDesk) -> None:
    """A single reply that is larger than the bound is delivered to whoever reads, now and on a resume."""
    desk = await start_desk({"big.py": BIG}, max_buffer_bytes=BOUND, max_reply_chars=10_000_000)
    async with desk.http.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "c"}, max_msg_size=0) as ws:
        await ws.send_json({"type": "message", "text": "big 3000000"})
        assert (await ws.receive_json())["type"] == "accepted"
        assert len((await ws.receive_json(timeout=10))["text"]) == 3_000_000
    async with desk.http.ws_connect(
        f"{desk.url}/v1/ws", params={"conversation": "c", "after": "0"}, max_msg_size=0
    ) as ws:
        assert len((await ws.receive_json(timeout=10))["text"]) == 3_000_000
    assert slow_readers(desk, "websocket") == 0


async def test_a_stop_does_not_wait_for_a_stalled_websocket(tmp_path: Path) -> None:
    """A host that stops tells its sockets to come back (1012) and cuts the one that does not read."""
    closed: list[int | None] = []
    async with contextlib.AsyncExitStack() as stack:
        visitor = await stack.enter_async_context(aiohttp.ClientSession())
        desk = await stack.enter_async_context(open_desk(tmp_path, {"big.py": BIG}))

        async def listen() -> None:
            async with visitor.ws_connect(f"{desk.url}/v1/ws", params={"conversation": "d"}) as ws:
                assert (await ws.receive(timeout=20)).type is aiohttp.WSMsgType.CLOSE
                closed.append(ws.close_code)

        listening = asyncio.ensure_future(listen())
        async with raw_socket(desk.url, "conversation=c&after=0", receive_buffer=4096):
            await say_big(desk, 160)
            await wait_until(
                lambda: desk.host.metrics.registry.get_sample_value("hotdesk_websockets") == 2, "both are connected"
            )
            started = time.monotonic()
            await stack.aclose()
            assert time.monotonic() - started < 6
        await listening
    assert closed == [1012]
