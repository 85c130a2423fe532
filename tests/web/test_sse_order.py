"""A slow reader of server-sent events gets fewer, larger chunks, and never one before another that came first."""

from __future__ import annotations

import asyncio

from aiohttp import web
from tests.web.visitors import raw_events, raw_stream, request_bytes

from conftest import wait_until
from hotdesk.chat.outbox import Event
from hotdesk.config import Config
from hotdesk.web.conversations import _SseSink
from hotdesk.web.pace import SOFT_BYTES


async def test_a_chunk_does_not_overtake_those_that_are_held() -> None:
    """Held pieces are written after what is on its way; what comes meanwhile, as another reads on, waits for them."""
    sink = _SseSink(Config(max_buffer_bytes=2**25), lambda: None, None)
    stop = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await sink.run(request, response, stop)
        return response

    application = web.Application()
    application.router.add_get("/", stream)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    large = 8 * 1024 * 1024  # over what the sockets take from who does not read
    try:
        async with raw_stream(f"http://127.0.0.1:{port}", receive_buffer=4096) as (reader, writer):
            writer.write(request_bytes("GET", "/"))
            await wait_until(lambda: sink._transport is not None, "the stream has begun")
            assert sink.send(Event.chunk("m", 0, "0" * large))
            assert sink.send(Event.chunk("m", 1, "1" * SOFT_BYTES))
            await wait_until(lambda: not sink._queue, "the first is being written")
            sink.send(Event.chunk("m", 2, "2"))
            sink.send(Event.chunk("m", 3, "3"))
            sink.end(Event.error("m", "cancelled", "the end"))
            text = "".join([data["text"] async for kind, data in raw_events(reader) if kind == "chunk"])
        assert text == "0" * large + "1" * SOFT_BYTES + "23"
    finally:
        stop.set()
        await runner.cleanup()
