"""A reader that does not read: it is let go within its bound, it can come back, and nobody else feels it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from tests.web.visitors import (
    TEXT,
    RawSocket,
    open_desk,
    raw_events,
    raw_socket,
    raw_stream,
    request_bytes,
    sse_events,
)

from conftest import Desk, StartDesk, wait_until
from hotdesk.config import Config

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

PING = 9
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


async def test_a_long_reply_reaches_who_asked_for_a_stream(start_desk: StartDesk) -> None:
    """One over the reader's bound, and what ends the stream after it, whether it came in chunks or at once."""
    desk = await start_desk({"big.py": BIG}, max_reply_chars=10_000_000)
    size = 2 * Config().max_buffer_bytes
    for text in (f"big {size}", f"stream {size // 20_000}"):
        async with desk.http.post(
            f"{desk.url}/v1/conversations/c/messages", json={"text": text}, headers={"Accept": "text/event-stream"}
        ) as response:
            body = await response.text()
        kinds = re.findall(r"^event: (\w+)$", body, re.M)
        assert [kind for kind in kinds if kind != "chunk"] == ["accepted", "reply", "done"]
        [reply] = re.findall(r"^event: reply\n(?:id: .*\n)?data: (.*)$", body, re.M)
        assert len(json.loads(reply)["text"]) > size - 20_000


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
    desk = await start_desk({"big.py": BIG}, max_buffer_bytes=BOUND, max_reply_chars=10_000_000, reader_stall_s=1.0)
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


# -- chunks for those who are slower than the stream -------------------------------------------------------------

PIECES = """
import asyncio
from hotdesk_sdk import hookimpl

ASKED = [0]
OPEN = asyncio.Event()

@hookimpl
async def respond(turn):
    count, size, pause = turn.text.split()
    for number in range(int(count)):
        ASKED[0] += 1
        await asyncio.sleep(float(pause))
        yield f"{number:08}".ljust(int(size), ".")
    await OPEN.wait()
    yield "end"
"""

PIECE = 2_000
PIECE_COUNT = 4_000
"""Eight megabytes in all: more than what two kernels hold for a socket that nobody reads."""

STREAM_TEXT = f"{PIECE_COUNT} {PIECE} 0"
WHOLE = "".join(f"{number:08}".ljust(PIECE, ".") for number in range(PIECE_COUNT)) + "end"


def plugin(desk: Desk) -> Any:
    generation = desk.host.plugins.entry("pieces").current
    assert generation is not None
    return sys.modules[generation.module_name]


async def start_pieces(start_desk: StartDesk, **config: Any) -> Desk:
    return await start_desk(
        {"pieces.py": PIECES}, **{"max_buffer_bytes": 64 * 2**20, "max_reply_chars": 2**28, **config}
    )


async def say(desk: Desk, text: str = STREAM_TEXT, id: str = "m") -> None:
    """Have a turn begin that nobody waits for but its readers."""
    async with desk.http.post(f"{desk.url}/v1/conversations/c/messages", json={"text": text, "id": id}) as response:
        assert response.status == 202


async def standstill(desk: Desk, below: int = PIECE_COUNT) -> int:
    """Wait until the bot is asked for nothing more, though it could go on; how many chunks it was asked for."""
    seen = [(-1, 0.0)]

    def stands() -> bool:
        if plugin(desk).ASKED[0] != seen[0][0]:
            seen[0] = (plugin(desk).ASKED[0], time.monotonic())
        return seen[0][0] > 0 and time.monotonic() - seen[0][1] > 0.4

    await wait_until(stands, "the stream stands still")
    assert plugin(desk).ASKED[0] < below
    return int(plugin(desk).ASKED[0])


async def all_asked(desk: Desk) -> None:
    await wait_until(lambda: plugin(desk).ASKED[0] == PIECE_COUNT, "the bot was asked for everything")


async def next_frame(socket: RawSocket) -> dict[str, Any]:
    """The next frame that is not a ping."""
    while (received := await socket.receive())[0] == PING:
        pass
    assert received[0] == TEXT, received
    frame: dict[str, Any] = json.loads(received[1])
    return frame


def add_chunk(said: list[str], frame: dict[str, Any]) -> None:
    """Put a chunk behind those before it: its index says how many pieces these were."""
    assert frame["index"] * PIECE == sum(map(len, said))
    said.append(frame["text"])


class Listener:
    """A reader of a conversation that keeps up: what it heard of chunks, how long it had to wait, and the reply."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.said: list[str] = []
        self.gap_s = 0.0
        self.reply = ""
        self._ws = ws
        self.task = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        at = 0.0
        while not self.reply:
            frame = await self._ws.receive_json(timeout=15)
            if frame["type"] == "chunk":
                self.said.append(frame["text"])
                self.gap_s, at = max(self.gap_s, time.monotonic() - at if at else 0.0), time.monotonic()
            elif frame["type"] == "reply":
                self.reply = frame["text"]


@contextlib.asynccontextmanager
async def listening(desk: Desk) -> AsyncIterator[Listener]:
    async with desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c", max_msg_size=0) as ws:
        listener = Listener(ws)
        try:
            yield listener
        finally:
            listener.task.cancel()
            await asyncio.wait([listener.task])


async def test_a_slow_websocket_gets_fewer_and_larger_chunks(start_desk: StartDesk) -> None:
    """What it did not take in time comes as one chunk, in its place by index; all its chunks are the reply's text."""
    desk = await start_pieces(start_desk)
    async with listening(desk) as quick, raw_socket(desk.url, "conversation=c", receive_buffer=4096) as slow:
        await say(desk)
        await all_asked(desk)
        said: list[str] = []
        while sum(map(len, said)) < PIECE * PIECE_COUNT:
            add_chunk(said, await next_frame(slow))
        plugin(desk).OPEN.set()
        add_chunk(said, await next_frame(slow))
        assert (await next_frame(slow))["text"] == "".join(said) == WHOLE
        assert len(said) < PIECE_COUNT * 0.9
        await quick.task
    assert len(quick.said) == PIECE_COUNT + 1
    assert quick.reply == WHOLE
    assert slow_readers(desk, "websocket") == 0


@pytest.mark.parametrize("door", ["post", "events"])
async def test_a_slow_event_stream_gets_fewer_and_larger_chunks(start_desk: StartDesk, door: str) -> None:
    """As with a WebSocket: for who posted the message, and for who listens."""
    desk = await start_pieces(start_desk)
    async with listening(desk) as quick, raw_stream(desk.url, 4096) as (reader, writer):
        if door == "post":
            headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
            body = f'{{"text":"{STREAM_TEXT}"}}'.encode()
            writer.write(request_bytes("POST", "/v1/conversations/c/messages", headers, body))
        else:
            writer.write(request_bytes("GET", "/v1/conversations/c/events"))
            await wait_until(
                lambda: desk.host.metrics.connections.labels("sse")._value.get() == 1, "the stream is open"
            )
            await say(desk)
        await all_asked(desk)
        said: list[str] = []
        reply = ""
        async for kind, data in raw_events(reader):
            if kind == "chunk":
                add_chunk(said, data)
                if sum(map(len, said)) == PIECE * PIECE_COUNT:
                    plugin(desk).OPEN.set()
            elif kind == "reply":
                reply = data["text"]
                break
        assert reply == "".join(said) == WHOLE
        assert len(said) < PIECE_COUNT * 0.9
        await quick.task
    assert len(quick.said) == PIECE_COUNT + 1
    assert slow_readers(desk, "sse") == 0


async def test_a_reply_overtakes_the_chunks_that_were_held(start_desk: StartDesk) -> None:
    """Who reads only after the turn's end gets what the kernel held of the chunks, and then the reply with it all."""
    desk = await start_pieces(start_desk)
    async with listening(desk) as quick, raw_socket(desk.url, "conversation=c", receive_buffer=4096) as slow:
        await say(desk)
        await all_asked(desk)
        plugin(desk).OPEN.set()
        await quick.task
        said: list[str] = []
        while (frame := await next_frame(slow))["type"] == "chunk":
            add_chunk(said, frame)
        assert frame["text"] == WHOLE
        assert WHOLE.startswith("".join(said))
        assert 0 < sum(map(len, said)) < len(WHOLE) * 0.9
        await say(desk, "1 10 0", id="n")
        assert (await next_frame(slow))["to"] == "n"  # and nothing of the old one comes after its reply


async def test_others_get_each_chunk_in_time_beside_slow_ones(start_desk: StartDesk) -> None:
    """A stalled WebSocket, a stalled event stream and one that is killed mid-stream add no gap for the others."""
    desk = await start_pieces(start_desk)
    async with contextlib.AsyncExitStack() as stack:
        quick = [await stack.enter_async_context(listening(desk)) for _ in range(3)]
        await stack.enter_async_context(raw_socket(desk.url, "conversation=c", receive_buffer=4096))
        _, writer = await stack.enter_async_context(raw_stream(desk.url, 4096))
        writer.write(request_bytes("GET", "/v1/conversations/c/events"))
        killed = await stack.enter_async_context(raw_socket(desk.url, "conversation=c"))
        await wait_until(lambda: desk.host.metrics.connections.labels("sse")._value.get() == 1, "the stream is open")
        await say(desk, "400 20000 0.005")
        await wait_until(lambda: plugin(desk).ASKED[0] > 200, "half of it is said")
        killed.writer.transport.abort()
        plugin(desk).OPEN.set()
        await asyncio.gather(*(listener.task for listener in quick))
    for listener in quick:
        assert len(listener.said) == 401
        assert "".join(listener.said) == listener.reply
        assert listener.gap_s < 0.3


# -- back-pressure -----------------------------------------------------------------------------------------------


async def test_a_stream_stands_still_while_its_only_reader_does(start_desk: StartDesk) -> None:
    """The bot is asked for no more than fits; the wait is not on its time; it goes on when the reader reads."""
    desk = await start_pieces(start_desk)
    desk.write("pieces.toml", "timeout_ms = 100")
    await desk.wait_generation("pieces", 2)
    async with raw_socket(desk.url, "conversation=c", receive_buffer=4096) as slow:
        await say(desk)
        await standstill(desk)
        said: list[str] = []
        plugin(desk).OPEN.set()
        while (frame := await next_frame(slow))["type"] == "chunk":
            add_chunk(said, frame)
        assert frame["text"] == "".join(said) == WHOLE
    assert (await desk.plugin("pieces"))["failures"] == 0
    assert slow_readers(desk, "websocket") == 0


async def test_a_posted_stream_stands_still_while_its_visitor_does(start_desk: StartDesk) -> None:
    """The same for the event stream of a POST."""
    desk = await start_pieces(start_desk)
    async with raw_stream(desk.url, 4096) as (reader, writer):
        headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
        body = f'{{"text":"{STREAM_TEXT}"}}'.encode()
        writer.write(request_bytes("POST", "/v1/conversations/c/messages", headers, body))
        await standstill(desk)
        plugin(desk).OPEN.set()
        said, kinds = "", []
        async for kind, data in raw_events(reader):
            if kind == "chunk":
                said += data["text"]
            else:
                kinds.append(kind)
    assert said == WHOLE
    assert kinds == ["accepted", "reply", "done"]


async def test_one_reader_that_reads_keeps_the_stream_going(start_desk: StartDesk) -> None:
    """A stream that stands still goes on at full speed when somebody comes who reads, and when the slow one leaves."""
    desk = await start_pieces(start_desk)
    async with raw_socket(desk.url, "conversation=c", receive_buffer=4096) as slow:
        await say(desk)
        await standstill(desk)
        async with listening(desk):
            await all_asked(desk)
        plugin(desk).OPEN.set()
        await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
        plugin(desk).OPEN.clear()
        plugin(desk).ASKED[0] = 0
        slow.writer.transport.abort()
    async with raw_socket(desk.url, "conversation=c", receive_buffer=4096) as slow:
        await say(desk, id="n")
        await standstill(desk)
        slow.writer.transport.abort()
        await all_asked(desk)
        plugin(desk).OPEN.set()


async def test_a_hundred_megabytes_for_nobody_take_no_memory(start_desk: StartDesk) -> None:
    """A stream of 100 MB to one stalled reader stands still, and the process grows by a few MB at most."""
    desk = await start_pieces(start_desk)
    me = psutil.Process()
    async with raw_socket(desk.url, "conversation=c", receive_buffer=4096):
        before = me.memory_info().rss
        await say(desk, "50000 2000 0")
        await standstill(desk, 10_000)
        assert me.memory_info().rss - before < 12 * 2**20  # what the kernel took of it is kept for the reply as well
        assert desk.host.turns.cancel("c", "m")
        await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")


async def test_a_reader_that_takes_nothing_is_let_go_and_resumes(start_desk: StartDesk) -> None:
    """After `reader_stall_s` it is closed with 1013 and the stream goes on; coming back by seq gives the reply."""
    desk = await start_pieces(start_desk, reader_stall_s=0.6)
    async with raw_socket(desk.url, "conversation=c", receive_buffer=4096) as stalled:
        await say(desk)
        await standstill(desk)
        await wait_until(lambda: slow_readers(desk, "websocket") == 1, "it is let go")
        plugin(desk).OPEN.set()
        assert await stalled.close_code() in (1013, None)  # None: the close frame was behind what it did not read
    await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    async with desk.http.ws_connect(
        f"{desk.url}/v1/ws", params={"conversation": "c", "after": "1"}, max_msg_size=0
    ) as ws:
        frame = await ws.receive_json(timeout=10)
    assert (frame["type"], frame["seq"], frame["text"]) == ("reply", 2, WHOLE)


async def test_a_stream_that_stands_still_can_be_cancelled(start_desk: StartDesk) -> None:
    """A cancel reaches a stream whose readers are all too slow; what was said is the reply."""
    desk = await start_pieces(start_desk)
    async with raw_socket(desk.url, "conversation=c", receive_buffer=4096):
        await say(desk)
        await standstill(desk)
        assert desk.host.turns.cancel("c", "m")
        await wait_until(lambda: desk.host.turns.live == 0, "the turn ended")
    [_, reply] = await desk.record()
    assert WHOLE.startswith(reply["text"])
    assert reply["metadata"] == {"cut": True, "cancelled": True}
