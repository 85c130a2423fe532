"""A lean load generator for HTTP: prebuilt request bytes, answers cut out by Content-Length, latencies kept.

Closed loop: each connection sends its next request when the last was answered; this finds the highest rate.
Open loop: requests leave at a fixed rate whatever the answers do, and latency counts from the moment at which a
request *should* have left, so that a stalled server cannot hide its stall (no coordinated omission).
The bare echo and the host are measured with the same code, which shares the machine's cores with both.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

__all__ = ["Answer", "ConnectionLost", "HttpClient", "Load", "closed_loop", "hold_gc", "open_loop", "request_bytes"]

# An answer that takes this long is a failure of its own; the host's own `?wait` is at most 10 s in all runs.
LAST_ANSWER_S = 20.0


class ConnectionLost(Exception):
    """The server closed a connection, or refused one, while a request was under way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, read whole."""

    status: int
    body: bytes


@dataclass(slots=True)
class Load:
    """What came of one stretch of load. `failures` says why, with how often."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def answered(self) -> int:
        return len(self.latencies_s)

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """The latency that *percent* of the answers did not exceed, in milliseconds; infinite without answers."""
        return percentile(self.latencies_s, percent) * 1000


def percentile(values: list[float], percent: float) -> float:
    """The smallest of *values* that at least *percent* of them do not exceed (nearest rank)."""
    if not values:
        return math.inf
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def request_bytes(method: str, target: str, body: bytes = b"", headers: str = "") -> bytes:
    """One HTTP/1.1 request. *headers* are whole lines that end in CRLF."""
    kind = "Content-Type: application/json\r\n" if body else ""
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{kind}{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class HttpConnection(asyncio.Protocol):
    """One keep-alive connection. Calls *answered* for every answer, and *lost* once, when it is closed."""

    __slots__ = ("_answered", "_buffer", "_lost", "transport")

    def __init__(
        self, answered: Callable[[HttpConnection, int, bytes], None], lost: Callable[[HttpConnection], None]
    ) -> None:
        self._answered = answered
        self._lost = lost
        self._buffer = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        while True:
            head = buffer.find(b"\r\n\r\n") + 4
            if head < 4:
                break
            end = head + _content_length(buffer[:head])
            if len(buffer) < end:
                break
            body, status = buffer[head:end], int(buffer[9:12])
            buffer = buffer[end:]
            self._answered(self, status, body)
        self._buffer = buffer

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(self)


def _content_length(head: bytes) -> int:
    at = head.find(b"Content-Length: ")
    if at < 0:
        raise ValueError(f"an answer without Content-Length: {head!r}")
    return int(head[at + 16 : head.index(b"\r", at)])


class HttpClient:
    """Requests one after the other, awaited. Connects at the first, and again after a loss."""

    def __init__(self, port: int, headers: str = "") -> None:
        self._port = port
        self._headers = headers
        self._connection: HttpConnection | None = None
        self._waiting: asyncio.Future[Answer] | None = None

    async def request(self, method: str, target: str, body: bytes = b"", *, timeout: float = 30.0) -> Answer:
        """Raises `ConnectionLost` when there is no answer, also because of the *timeout*."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                if self._connection is None:
                    _, self._connection = await loop.create_connection(
                        lambda: HttpConnection(self._answer, self._drop), "127.0.0.1", self._port
                    )
                self._waiting = loop.create_future()
                self._connection.transport.write(request_bytes(method, target, body, self._headers))
                return await self._waiting
        except (OSError, TimeoutError) as exc:
            self.close()
            raise ConnectionLost(f"{method} {target}: {exc!r}") from exc

    def close(self) -> None:
        if self._connection is not None:
            self._connection.transport.abort()
            self._connection = None

    def _answer(self, connection: HttpConnection, status: int, body: bytes) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Answer(status, body))

    def _drop(self, connection: HttpConnection) -> None:
        if connection is self._connection:
            self._connection = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ConnectionResetError("closed by the server"))


@contextmanager
def hold_gc() -> Iterator[None]:
    """Keep this process's collector from pausing a measurement: the pause would be booked as the server's."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


async def closed_loop(
    port: int,
    request: Callable[[int, int], bytes],
    accept: Callable[[int, bytes], bool],
    *,
    connections: int,
    seconds: float,
) -> Load:
    """As fast as it goes for *seconds*. *request* makes a connection's n-th request, *accept* judges an answer."""
    loop = asyncio.get_running_loop()
    load = Load()
    turn: dict[HttpConnection, tuple[int, int, float]] = {}
    finished = loop.create_future()

    def answered(connection: HttpConnection, status: int, body: bytes) -> None:
        now = perf_counter()
        number, n, began = turn[connection]
        if now < deadline:
            if accept(status, body):
                load.latencies_s.append(now - began)
            else:
                load.failures[f"{status} {body[:120].decode(errors='replace')}"] += 1
            turn[connection] = (number, n + 1, now)
            connection.transport.write(request(number, n + 1))
        else:
            leave(connection)

    def leave(connection: HttpConnection) -> None:
        turn.pop(connection, None)
        if not turn and not finished.done():
            finished.set_result(None)

    def lost(connection: HttpConnection) -> None:
        if connection in turn:
            load.failures["connection lost"] += 1
            leave(connection)

    opened = [
        (await loop.create_connection(lambda: HttpConnection(answered, lost), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    with hold_gc():
        began = perf_counter()
        deadline = began + seconds
        for number, connection in enumerate(opened):
            turn[connection] = (number, 0, perf_counter())
            connection.transport.write(request(number, 0))
        async with asyncio.timeout(seconds + LAST_ANSWER_S):
            await finished
    load.seconds = seconds
    for connection in opened:
        connection.transport.abort()
    return load


async def open_loop(
    port: int,
    request: Callable[[int], bytes],
    accept: Callable[[int, int, bytes], bool],
    *,
    rate: float,
    seconds: float,
    connections: int = 64,
    pinned: bool = False,
) -> Load:
    """*rate* requests a second, evenly; where all connections are busy, requests queue and their latency runs.

    *request* makes the n-th request as it leaves, *accept* judges its answer. *pinned*: the n-th goes over connection
    n modulo *connections*, as of visitors who have one each, and not over any that is free, as a proxy's do.
    """
    lanes = [_Lane() for _ in range(connections if pinned else 1)]
    generator = _OpenLoop(port, request, accept, lanes)
    for number in range(connections):
        await generator.connect(lanes[number % len(lanes)])
    with hold_gc():
        await generator.run(rate, round(rate * seconds))
    generator.close()
    return generator.load


@dataclass(slots=True, eq=False)
class _Lane:
    """Connections that share their requests: all of them, or each its own."""

    idle: deque[HttpConnection] = field(default_factory=deque)
    queue: deque[tuple[int, float]] = field(default_factory=deque)


class _OpenLoop:
    def __init__(
        self, port: int, request: Callable[[int], bytes], accept: Callable[[int, int, bytes], bool], lanes: list[_Lane]
    ) -> None:
        self.load = Load()
        self._port = port
        self._request = request
        self._accept = accept
        self._lanes = lanes
        self._lane_of: dict[HttpConnection, _Lane] = {}
        self._busy: dict[HttpConnection, tuple[int, float]] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._closed = False

    async def connect(self, lane: _Lane) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: HttpConnection(self._answered, self._lost), "127.0.0.1", self._port
        )
        self._lane_of[connection] = lane
        lane.idle.append(connection)

    async def run(self, rate: float, count: int) -> None:
        began, n = perf_counter(), 0
        while n < count:
            now = perf_counter()
            while n < count and (due := began + n / rate) <= now:
                lane = self._lanes[n % len(self._lanes)]
                lane.queue.append((n, due))
                self._send_queued(lane)
                n += 1
            # uvloop's timers tick in milliseconds; what is due within one leaves together, its latency running.
            await asyncio.sleep(max(0.0005, due - now))
        self.load.seconds = perf_counter() - began
        give_up = perf_counter() + LAST_ANSWER_S
        while (left := len(self._busy) + sum(len(lane.queue) for lane in self._lanes)) and perf_counter() < give_up:
            for lane in self._lanes:
                self._send_queued(lane)
            await asyncio.sleep(0.005)
        if left:
            self.load.failures["no answer"] += left

    def close(self) -> None:
        self._closed = True
        for task in self._opening:
            task.cancel()
        for connection in self._lane_of:
            connection.transport.abort()

    def _send_queued(self, lane: _Lane) -> None:
        while lane.queue and lane.idle:
            connection = lane.idle.popleft()
            n, due = lane.queue.popleft()
            self._busy[connection] = (n, due)
            connection.transport.write(self._request(n))

    def _answered(self, connection: HttpConnection, status: int, body: bytes) -> None:
        n, due = self._busy.pop(connection)
        if self._accept(n, status, body):
            self.load.latencies_s.append(perf_counter() - due)
        else:
            self.load.failures[f"{status} {body[:120].decode(errors='replace')}"] += 1
        lane = self._lane_of[connection]
        lane.idle.append(connection)
        self._send_queued(lane)

    def _lost(self, connection: HttpConnection) -> None:
        """A connection that the server closed is replaced; what was under way on it has failed."""
        if self._closed:
            return
        lane = self._lane_of.pop(connection)
        if self._busy.pop(connection, None) is not None:
            self.load.failures["connection lost"] += 1
        elif connection in lane.idle:
            lane.idle.remove(connection)
        task = asyncio.get_running_loop().create_task(self._reconnect(lane))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _reconnect(self, lane: _Lane) -> None:
        while not self._closed:
            try:
                return await self.connect(lane)
            except OSError:
                await asyncio.sleep(0.02)
        return None
