"""A worker leaves the port: whatever its visitors have begun to ask is answered first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import web

from conftest import wait_until
from hotdesk.web.departure import Departure

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"


@dataclass
class Door:
    """An application that answers with the body that it was sent."""

    runner: web.AppRunner
    departure: Departure
    port: int

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that the server has taken."""
        count = self.count
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        await wait_until(lambda: self.count == count + 1, "the connection to be taken")
        return reader, writer

    @property
    def count(self) -> int:
        assert self.runner.server is not None
        return len(self.runner.server.connections)

    async def is_closed(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except ConnectionError:
            return True
        writer.close()
        return False

    def leave(self) -> asyncio.Task[None]:
        async def leave() -> None:
            await self.departure.close_port(self.runner)
            await self.departure.answer_all(self.runner, 20.0)

        return asyncio.create_task(leave())


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with opened() as door:
        yield door


@asynccontextmanager
async def opened() -> AsyncIterator[Door]:
    async def echo(request: web.Request) -> web.StreamResponse:
        if request.path == "/ws":
            ws = web.WebSocketResponse()
            await ws.prepare(request)
            async for message in ws:
                await ws.send_str(message.data)
            return ws
        return web.Response(body=await request.read())

    departure = Departure()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", echo)
    app.on_response_prepare.append(departure.tell)
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Door(runner, departure, runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of an answer."""
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        return head, await reader.readexactly(5)


async def test_a_connection_that_has_just_come_may_still_ask(door: Door) -> None:
    """It was taken before the port was left, and its request was on its way: it is answered, and that is the end."""
    reader, writer = await door.connect()
    leaving = door.leave()
    await asyncio.sleep(0)
    writer.write(HEAD + b"hello")
    head, body = await answer(reader)
    assert (head.split()[1], body) == (b"200", b"hello")
    assert b"\r\nConnection: close\r\n" in head
    assert await reader.read() == b""
    await leaving
    writer.close()


async def test_a_request_that_is_under_way_is_waited_for(door: Door) -> None:
    """However long its body takes, within the time that there is."""
    reader, writer = await door.connect()
    writer.write(HEAD + b"he")
    await wait_until(lambda: any(one._current_request for one in door.runner.server.connections), "it to be read")
    leaving = door.leave()
    await wait_until(door.is_closed, "the port to be closed")
    assert not leaving.done()
    writer.write(b"llo")
    assert (await answer(reader))[1] == b"hello"
    await leaving
    writer.close()


async def test_who_keeps_a_connection_is_told_to_close_it(door: Door) -> None:
    """Before, it stays open; with the next answer it is not; a silent one is closed after a moment."""
    asking, late, silent = await door.connect(), await door.connect(), await door.connect()
    asking[1].write(HEAD + b"hello")
    assert b"close" not in (await answer(asking[0]))[0]
    leaving = door.leave()
    await asyncio.sleep(0)
    asking[1].write(HEAD + b"again")
    assert b"Connection: close" in (await answer(asking[0]))[0]
    assert await asking[0].read() == b""
    late[1].write(HEAD + b"hello")  # so that one was closed for its answer, and not for its silence
    assert (await answer(late[0]))[1] == b"hello"
    assert await silent[0].read() == b""
    await leaving
    for _, writer in (asking, late, silent):
        writer.close()


async def test_a_socket_is_left_alone(door: Door) -> None:
    """It is closed by its own door, with a code that says why."""
    reader, writer = await door.connect()
    writer.write(
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    await door.leave()
    writer.write(b"\x81\x82\0\0\0\0hi")
    assert await reader.readexactly(4) == b"\x81\x02hi"
    writer.close()


async def test_a_desk_that_stops_waits_for_nobody_here(door: Door) -> None:
    """There is nobody else to come back to."""
    _, writer = await door.connect()
    writer.write(HEAD + b"he")
    await wait_until(lambda: any(one._current_request for one in door.runner.server.connections), "it to be read")
    door.departure.hurry()
    async with asyncio.timeout(10):  # of the 20 s that there would be
        await door.leave()
    writer.close()
