"""What talks to the doors in these tests: raw sockets for what no library would send, and readers of both streams."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from conftest import ADMIN_TOKEN, Desk
from hotdesk.app import open_host
from hotdesk.config import Config
from hotdesk.errors import DOOR_ERRORS

TEXT, BINARY, CLOSE = 1, 2, 8


@contextlib.asynccontextmanager
async def open_desk(home: Path, plugins: dict[str, str] | None = None, **config: Any) -> AsyncIterator[Desk]:
    """A host in *home* that stops when the context ends, so that the next one in *home* is the same desk restarted."""
    folder = home / "plugins"
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in (plugins or {}).items():
        (folder / name).write_text(source)
    settings = {"standby_s": 0.1, "stop_timeout_s": 3.0, "data": str(home / "data"), "admin_token": ADMIN_TOKEN}
    async with (
        open_host(Config(plugins=(str(folder),), port=0, **{**settings, **config})) as host,
        aiohttp.ClientSession() as http,
    ):
        yield Desk(host, folder, http)


@dataclass(slots=True)
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def assert_one_shape(answer: Answer, code: str) -> None:
    """The error is *code*, with its documented status, in the one shape and with no traceback in it."""
    assert answer.headers["content-type"] == "application/json", answer
    document = answer.json()
    assert set(document) == {"error"}, document
    error = document["error"]
    assert error["code"] == code, error
    assert answer.status == DOOR_ERRORS[code][0], answer
    assert set(error) <= {"code", "message", "hint"}, error
    assert error["message"], error
    assert b"Traceback" not in answer.body
    assert b'File \\"' not in answer.body


def assert_error_frame(frame: dict[str, Any], code: str) -> None:
    """A WebSocket frame is the error *code* in its one shape."""
    assert frame["type"] == "error", frame
    assert frame["code"] == code, frame
    assert code in DOOR_ERRORS
    assert set(frame) <= {"type", "code", "message", "to"}, frame
    assert frame["message"]
    assert "Traceback" not in frame["message"]


def request_bytes(method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> bytes:
    """An HTTP request as bytes; what is in it is nobody's business but the caller's."""
    lines = {"Host": "desk", "Connection": "close", **(headers or {})}
    if body is not None and "Content-Length" not in lines and "Transfer-Encoding" not in lines:
        lines["Content-Length"] = str(len(body))
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return head.encode("utf-8", "surrogateescape") + b"\r\n" + (body or b"")


async def exchange(url: str, data: bytes) -> Answer:
    """Send *data* on a connection of its own and read the answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return await read_answer(reader)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 15)).decode("latin-1")
    first, *lines = head.split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }
    body = b""
    if length := int(headers.get("content-length", "0")):
        body = await asyncio.wait_for(reader.readexactly(length), 15)
    return Answer(int(first.split()[1]), headers, body)


def frame_bytes(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """A WebSocket frame, lawful or not."""
    first = (0x80 if fin else 0) | reserved | opcode
    bit = 0x80 if masked else 0
    if len(payload) < 126:
        head = struct.pack("!BB", first, bit | len(payload))
    elif len(payload) < 65536:
        head = struct.pack("!BBH", first, bit | 126, len(payload))
    else:
        head = struct.pack("!BBQ", first, bit | 127, len(payload))
    return head + (b"\0\0\0\0" if masked else b"") + payload


class RawSocket:
    """A WebSocket visitor that reads when it is told to and not before."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, frame: bytes) -> None:
        self.writer.write(frame)

    def say(self, text: str, **fields: Any) -> None:
        self.send(frame_bytes(TEXT, json.dumps({"type": "message", "text": text, **fields}).encode()))

    async def receive(self) -> tuple[int, bytes]:
        """The next frame: its opcode and payload. Raises `IncompleteReadError` when the connection is over."""
        async with asyncio.timeout(20):
            first, size = await self.reader.readexactly(2)
            if size == 126:
                (size,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return first & 0x0F, await self.reader.readexactly(size)

    async def receive_json(self) -> dict[str, Any]:
        opcode, payload = await self.receive()
        assert opcode == TEXT, (opcode, payload)
        frame: dict[str, Any] = json.loads(payload)
        return frame

    async def close_code(self) -> int | None:
        """Read on to the close frame: its code, or None when the connection just ended."""
        try:
            while True:
                opcode, payload = await self.receive()
                if opcode == CLOSE:
                    return int(struct.unpack("!H", payload[:2])[0])
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def aclose(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def raw_socket(url: str, query: str, *, receive_buffer: int = 0) -> AsyncIterator[RawSocket]:
    """A WebSocket connection of bare bytes. *receive_buffer* keeps the kernel from reading on the visitor's behalf."""
    async with raw_stream(url, receive_buffer) as (reader, writer):
        key = base64.b64encode(os.urandom(16)).decode()
        upgrade = {
            "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key,
        }  # fmt: skip
        writer.write(request_bytes("GET", f"/v1/ws?{query}", upgrade))
        answer = await read_answer(reader)
        assert answer.status == 101, answer
        yield RawSocket(reader, writer)


@contextlib.asynccontextmanager
async def raw_stream(
    url: str, receive_buffer: int = 0
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    parts = urlsplit(url)
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (parts.hostname, parts.port))
    limit = receive_buffer or 2**26
    reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def raw_events(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """The events of a response in chunked coding, read at the pace of who asks."""
    async with asyncio.timeout(15):
        await reader.readuntil(b"\r\n\r\n")
        pending = b""
        while True:
            line = b""
            while not line.endswith(b"\r\n"):
                line += await reader.readexactly(1)
            size = int(line, 16)
            if not size:
                return
            *events, pending = (pending + (await reader.readexactly(size + 2))[:-2]).split(b"\n\n")
            for event in events:
                fields = dict(row.split(b": ", 1) for row in event.split(b"\n") if b": " in row)
                if b"event" in fields:
                    yield fields[b"event"].decode(), json.loads(fields[b"data"])


@dataclass(slots=True)
class SseEvent:
    """One server-sent event."""

    kind: str = "message"
    data: Any = None
    id: int | None = None
    lines: list[str] = field(default_factory=list)


async def sse_events(response: aiohttp.ClientResponse) -> AsyncIterator[SseEvent]:
    """The events of a stream as they come."""
    event = SseEvent()
    async for line in response.content:
        text = line.decode().rstrip("\n")
        name, _, value = text.partition(": ")
        if not text:
            if event.lines:
                yield event
            event = SseEvent()
        elif name == "event":
            event.kind = value
        elif name == "data":
            event.data = json.loads(value)
        elif name == "id":
            event.id = int(value)
        if text:
            event.lines.append(text)
