"""The load generator measures what it claims to: stalls count, cut answers are put together, losses are failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from tests.load.client import ConnectionLost, HttpClient, HttpConnection, open_loop, percentile, request_bytes
from tests.load.sockets import WebSocket

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def answering(answer: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """A server that does *answer* for each request; yields its port."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await answer(writer)
        except (OSError, EOFError):
            pass

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        for writer in writers:
            writer.close()


async def test_a_stall_is_counted_for_everybody_who_would_have_met_it():
    """With 0.3 s of silence in a second at a steady rate, about a third of the requests are late, not one."""
    loop = asyncio.get_running_loop()
    asked, silent_until = 0, 0.0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal asked, silent_until
        asked += 1
        if asked == 40:
            silent_until = loop.time() + 0.3
        await asyncio.sleep(max(0.0, silent_until - loop.time()))
        writer.write(ANSWER)

    async with answering(answer) as port:
        load = await open_loop(
            port, lambda n: request_bytes("GET", "/"), lambda n, status, body: True, rate=200, seconds=1, connections=2
        )
    assert (load.answered, load.failed) == (200, 0)
    late = sum(latency > 0.05 for latency in load.latencies_s) / load.answered
    assert late > 0.15
    assert load.percentile_ms(99) > 200


async def test_a_connection_closed_under_a_request_is_a_failure_and_is_replaced():
    """The request on it has failed; those after it are answered on a new connection."""
    closed = 0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal closed
        if closed == 0:
            closed += 1
            writer.close()
        else:
            writer.write(ANSWER)

    async with answering(answer) as port:
        load = await open_loop(
            port, lambda n: request_bytes("GET", "/"), lambda n, status, body: True, rate=50, seconds=0.4, connections=1
        )
    assert (load.answered, load.failures) == (19, {"connection lost": 1})


async def test_a_client_says_when_there_is_no_answer():
    """Closed by the server, or nobody there: both are `ConnectionLost`, and the next request connects anew."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with answering(answer) as port:
        client = HttpClient(port)
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await client.request("GET", "/")
    with pytest.raises(ConnectionLost):
        await client.request("GET", "/")


@pytest.mark.parametrize("step", [1, 7, 1000])
async def test_answers_are_cut_out_wherever_the_network_split_them(step: int):
    """Two answers in pieces of any size are two answers."""
    seen: list[tuple[int, bytes]] = []
    connection = HttpConnection(lambda _, status, body: seen.append((status, body)), lambda _: None)
    data = ANSWER + b"HTTP/1.1 404 Not Found\r\nServer: x\r\nContent-Length: 0\r\n\r\n"
    for at in range(0, len(data), step):
        connection.data_received(data[at : at + step])
    assert seen == [(200, b"ok"), (404, b"")]


@pytest.mark.parametrize("step", [1, 1000, 100_000])
async def test_frames_of_every_size_are_read(step: int):
    """The three ways to write a frame's length, in pieces of any size, after the handshake."""
    seen: list[bytes] = []
    socket = WebSocket("/", lambda _, text: seen.append(text))
    texts = [b"a" * 5, b"b" * 300, b"c" * 70_000]
    heads = [
        bytes((0x81, 5)),
        bytes((0x81, 126)) + (300).to_bytes(2, "big"),
        bytes((0x81, 127)) + (70_000).to_bytes(8, "big"),
    ]
    data = b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + b"".join(map(bytes.__add__, heads, texts))
    for at in range(0, len(data), step):
        socket.data_received(data[at : at + step])
    await socket.wait_open()
    assert seen == texts


def test_percentiles_are_values_that_were_measured():
    """Nearest rank: the 99th of a hundred is the 99th, the 100th the largest, and of nothing it is infinite."""
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (50, 99, 100)] == [50, 99, 100]
    assert percentile([], 50) == float("inf")


async def test_a_visitors_requests_go_over_the_visitors_own_connection():
    """Pinned, the n-th over connection n modulo their number, also where another is free."""
    asked: dict[int, set[int]] = {}
    seen: list[tuple[int, int]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        try:
            while line := await reader.readuntil(b"\r\n\r\n"):
                seen.append((port, int(line.split()[1][1:])))
                writer.write(ANSWER)
        except (OSError, EOFError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        load = await open_loop(
            server.sockets[0].getsockname()[1],
            lambda n: request_bytes("GET", f"/{n}"),
            lambda n, status, body: True,
            rate=500,
            seconds=0.2,
            connections=4,
            pinned=True,
        )
    assert (load.answered, load.failed) == (100, 0)
    for port, n in seen:
        asked.setdefault(port, set()).add(n % 4)
    assert sorted(map(sorted, asked.values())) == [[0], [1], [2], [3]]
