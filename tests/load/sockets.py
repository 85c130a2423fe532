"""A lean WebSocket client on bare asyncio, for text frames only, and a closed loop with it.

Frames are masked with a mask of zeros: to the server that is a masked frame like any other, with the same work to
do, and it leaves the payload as it is, so that the client has none.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from time import perf_counter

from tests.load.client import ConnectionLost, Load, hold_gc

__all__ = ["WebSocket", "open_socket", "socket_loop"]

_TEXT, _CLOSE, _PING, _PONG = 0x1, 0x8, 0x9, 0xA


def frame(payload: bytes, opcode: int = _TEXT) -> bytes:
    """One masked frame of a client."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65536:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    return head + b"\0\0\0\0" + payload


class WebSocket(asyncio.Protocol):
    """One connection. Calls *received* with each text, answers pings, and keeps how it ended in `closed`."""

    __slots__ = ("_buffer", "_open", "_received", "_request", "closed", "transport")

    def __init__(self, target: str, received: Callable[[WebSocket, bytes], None]) -> None:
        self._received = received
        self._buffer = b""
        self._open: asyncio.Future[None] | None = asyncio.get_running_loop().create_future()
        self._request = (
            f"GET {target} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        ).encode()
        self.closed: str | None = None
        self.transport: asyncio.Transport

    async def wait_open(self) -> None:
        """Wait for the end of the handshake. Raises `ConnectionLost` when the server refuses."""
        if self._open is not None:
            await self._open
            self._open = None

    def send(self, text: bytes) -> None:
        self.transport.write(frame(text))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if self._open is not None and not self._open.done():
            head = buffer.find(b"\r\n\r\n") + 4
            if head < 4:
                self._buffer = buffer
                return
            if not buffer.startswith(b"HTTP/1.1 101"):
                self._refuse(ConnectionLost(buffer[:200].decode(errors="replace")))
                self.transport.abort()
                return
            self._open.set_result(None)
            buffer = buffer[head:]
        self._buffer = self._take_frames(buffer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = self.closed or f"lost: {exc!r}"
        if self._open is not None and not self._open.done():
            self._refuse(ConnectionLost(self.closed))

    def _refuse(self, exc: ConnectionLost) -> None:
        assert self._open is not None
        self._open.set_exception(exc)
        self._open.exception()  # it is known: who wanted to connect may not wait for it any more

    def _take_frames(self, buffer: bytes) -> bytes:
        """Handle every whole frame in *buffer*; return what is left."""
        at, end = 0, len(buffer)
        while end - at >= 2:
            size, start = buffer[at + 1] & 0x7F, at + 2
            if size == 126:
                size, start = int.from_bytes(buffer[at + 2 : at + 4], "big"), at + 4
            elif size == 127:
                size, start = int.from_bytes(buffer[at + 2 : at + 10], "big"), at + 10
            if start + size > end:
                break
            opcode, payload, at = buffer[at] & 0x0F, buffer[start : start + size], start + size
            if opcode == _TEXT:
                self._received(self, payload)
            elif opcode == _PING:
                self.transport.write(frame(payload, _PONG))
            elif opcode == _CLOSE:
                self.closed = f"closed by the server: {int.from_bytes(payload[:2], 'big')} {payload[2:]!r}"
                self.transport.close()
        return buffer[at:]


async def open_socket(
    port: int, target: str, received: Callable[[WebSocket, bytes], None], *, source: str | None = None
) -> WebSocket:
    """Connect and shake hands; *source* is the local address, of which each has its own range of ports."""
    _, socket = await asyncio.get_running_loop().create_connection(
        lambda: WebSocket(target, received), "127.0.0.1", port, local_addr=(source, 0) if source else None
    )
    try:
        await socket.wait_open()
    except BaseException:
        socket.transport.abort()
        raise
    return socket


async def socket_loop(
    port: int,
    target: Callable[[int], str],
    message: Callable[[int, int], bytes],
    accept: Callable[[bytes], bool | None],
    *,
    connections: int,
    in_flight: int,
    seconds: float,
) -> Load:
    """Keep *in_flight* messages under way on each connection for *seconds*.

    *message* makes a connection's n-th message. *accept* says of a frame: True, it ends a message; False, it is a
    failure that does; None, it is something on the way.
    """
    load = Load()
    under_way: dict[WebSocket, int] = {}
    numbers: dict[WebSocket, tuple[int, int]] = {}
    running = True

    def received(socket: WebSocket, text: bytes) -> None:
        verdict = accept(text)
        if verdict is None:
            return
        now = perf_counter()
        if now < deadline:
            if verdict:
                # Per-message latency means little with several under way; the count is what is asked for.
                load.latencies_s.append(now)
            else:
                load.failures[text[:120].decode(errors="replace")] += 1
        if running:
            number, n = numbers[socket]
            numbers[socket] = (number, n + 1)
            socket.send(message(number, n))
        else:
            under_way[socket] -= 1

    deadline = perf_counter() + 3600
    sockets = [await open_socket(port, target(number), received) for number in range(connections)]
    with hold_gc():
        deadline = perf_counter() + seconds
        for number, socket in enumerate(sockets):
            numbers[socket] = (number, in_flight)
            under_way[socket] = in_flight
            socket.transport.write(b"".join(frame(message(number, n)) for n in range(in_flight)))
        await asyncio.sleep(seconds)
        running = False
        for _ in range(1000):
            if not any(under_way.values()):
                break
            await asyncio.sleep(0.01)
    load.seconds = seconds
    load.failures["no answer"] += sum(under_way.values())
    load.failures += Counter()  # drops zeros
    for socket in sockets:
        if socket.closed:
            load.failures[socket.closed] += 1
        socket.transport.abort()
    return load
