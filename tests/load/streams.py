"""A streamed answer over server-sent events, read as a visitor's browser would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from tests.load.client import ConnectionLost, request_bytes

__all__ = ["read_events"]


async def read_events(port: int, target: str, body: bytes, *, gap_s: float = 10.0) -> AsyncIterator[tuple[str, bytes]]:
    """Post *body* and yield each event with its data, to the end of the stream.

    Raises `ConnectionLost` where the stream stops without its end, or is silent for *gap_s*.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes("POST", target, body, "Accept: text/event-stream\r\n"))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), gap_s)
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise ConnectionLost(head.decode(errors="replace"))
        pending = b""
        while chunk := await asyncio.wait_for(_read_chunk(reader), gap_s):
            *events, pending = (pending + chunk).split(b"\n\n")
            for event in events:
                lines = dict(line.split(b": ", 1) for line in event.split(b"\n") if b": " in line)
                if b"event" in lines:
                    yield lines[b"event"].decode(), lines.get(b"data", b"")
    except (OSError, EOFError, TimeoutError) as exc:
        raise ConnectionLost(repr(exc)) from exc
    finally:
        writer.close()


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    """One chunk of HTTP/1.1's chunked coding; empty at the end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    chunk = await reader.readexactly(size + 2)
    return chunk[:-2]
