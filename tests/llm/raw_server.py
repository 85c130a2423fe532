"""A provider of bare sockets that says what it is told to, byte by byte, and the bytes that one says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["DONE", "END", "HEAD", "STOP", "Handler", "event", "piece", "read_request", "said", "serving", "whole"]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def piece(data: bytes) -> bytes:
    """One piece of HTTP/1.1's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data: bytes | dict[str, Any]) -> bytes:
    """A server-sent event, in a piece of its own."""
    return piece(b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n")


def said(text: str) -> bytes:
    """An event with *text*."""
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


STOP = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = event(b"[DONE]")


def whole(body: bytes | dict[str, Any], status: bytes = b"200 OK") -> bytes:
    """An answer in one piece."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(data))
    return head + data


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """The next request's body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
    return await reader.readexactly(int(length[0].split(b":")[1])) if length else b""


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Serve each connection with *handler* until the context ends; gives the `base_url`."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**26)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
