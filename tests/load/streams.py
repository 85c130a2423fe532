"""A streamed answer over server-sent events, read as a visitor's browser would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from time import perf_counter

import msgspec
from tests.load.client import ConnectionLost, request_bytes
from tests.load.desk import message_body, message_target, read_entry, shown
from tests.load.history import Accepted, History, Sent, Streamed

__all__ = ["read_events", "stream_turns"]


async def stream_turns(port: int, conversation: str, history: History, over: Callable[[], bool]) -> None:
    """One streamed turn after the other, until the run is *over*; each goes into *history*."""
    n = 0
    while not over():
        n += 1
        await _stream_turn(port, conversation, f"{conversation}-{n}", history)


async def _stream_turn(port: int, conversation: str, id: str, history: History) -> None:
    history.add(Sent(conversation=conversation, id=id, time=perf_counter()))
    text, ended = "", False
    try:
        target = message_target(conversation, wait=False)
        async for event, data in read_events(port, target, message_body(id, "slowly")):
            now = perf_counter()
            if event == "accepted":
                seq = msgspec.json.decode(data)["seq"]
                history.add(Accepted(conversation=conversation, id=id, time=now, seq=seq))
            elif event == "chunk":
                text += msgspec.json.decode(data)["text"]
            elif event == "reply":
                history.add(shown(read_entry(data), now))
            ended = event == "done"
    except ConnectionLost:
        await asyncio.sleep(0.1)
    history.add(Streamed(conversation=conversation, id=id, time=perf_counter(), text=text, ended=ended))


async def read_events(
    port: int, target: str, body: bytes, *, method: str = "POST", headers: str = "", gap_s: float = 10.0
) -> AsyncIterator[tuple[str, bytes]]:
    """Post *body*, or use another *method*, and yield each event with its data, to the end of the stream.

    Raises `ConnectionLost` where nobody is there, the stream stops without its end, or is silent for *gap_s*.
    """
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as exc:
        raise ConnectionLost(repr(exc)) from exc
    try:
        writer.write(request_bytes(method, target, body, f"Accept: text/event-stream\r\n{headers}"))
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
