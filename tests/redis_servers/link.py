"""A stretch of network between a host and a server, which can be cut, stalled and slowed without any rights."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Self

from .ports import free_port

__all__ = ["Link"]


class Link:
    """A relay: what connects to `port` is connected to the server. Each way keeps its order, also when slowed.

    `delay_s`, which may be changed at any time, is added each way. A server that is not there looks from here like one
    that takes connections and drops them at once; for a port that refuses, `cut` the link.
    """

    def __init__(self, address: str, port: int, to: tuple[str, int], delay_s: float) -> None:
        self.address = address
        self.port = port
        self.delay_s = delay_s
        self.accepted = 0
        """How many connections there have been."""
        self._to = to
        self._server: asyncio.Server | None = None
        self.stalled = False
        """Nothing is passed on now."""
        self.ends: set[_End] = set()
        """Of the connections that are open, for the ends themselves."""
        self._reaching: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, port: int, *, to: str = "127.0.0.1", address: str = "127.0.0.1", delay_s: float = 0.0) -> Self:
        """Relay a new port of *address* to *port* of the address *to*, until `aclose` or the end of `async with`."""
        link = cls(address, free_port(address), (to, port), delay_s)
        await link._listen()
        return link

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Refuse and drop everything for good; a second call is fine."""
        self.cut()
        if self._reaching:
            await asyncio.wait(self._reaching)

    @property
    def connections(self) -> int:
        """Those that are open now, on the side of the host."""
        return sum(end.near for end in self.ends)

    def cut(self) -> None:
        """Drop all connections, on both sides, and refuse new ones until `heal`; what was on its way is lost."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._reaching:
            task.cancel()
        for end in list(self.ends):
            end.drop()

    def stall(self) -> None:
        """Take connections and pass nothing on, either way, until `heal`; what is sent meanwhile is passed on then."""
        self.stalled = True
        for end in self.ends:
            end.read_or_wait()

    async def heal(self) -> None:
        """Be a good link again, on the same port."""
        self.stalled = False
        for end in self.ends:
            end.read_or_wait()
            end.pass_on()
        if self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._take, self.address, self.port, backlog=1024)

    def _take(self) -> _End:
        """The near end of a new connection; the far one is on its way."""
        self.accepted += 1
        near = _End(self, near=True)
        task = asyncio.get_running_loop().create_task(self._reach(near))
        self._reaching.add(task)
        task.add_done_callback(self._reaching.discard)
        return near

    async def _reach(self, near: _End) -> None:
        far = _End(self, near=False)
        near.other, far.other = far, near
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, *self._to)
        except OSError:
            near.drop()


class _End(asyncio.Protocol):
    """One end of a relayed connection, and what came from it and is still to be passed on to the other end."""

    def __init__(self, link: Link, *, near: bool) -> None:
        self.near = near
        self.other: _End | None = None
        self.transport: asyncio.Transport | None = None
        self._link = link
        self._on_its_way: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport
        self._link.ends.add(self)
        self.read_or_wait()
        if self.other is not None:
            self.other.pass_on()

    def data_received(self, data: bytes) -> None:
        self._on_its_way.append((asyncio.get_running_loop().time() + self._link.delay_s, data))
        self.pass_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._link.ends.discard(self)
        self.pass_on()

    def pause_writing(self) -> None:
        self._full = True
        if self.other is not None:
            self.other.read_or_wait()

    def resume_writing(self) -> None:
        self._full = False
        if self.other is not None:
            self.other.read_or_wait()

    def read_or_wait(self) -> None:
        """Read unless there is no way on; then the sender is held up by its own system, as it would be."""
        if self.transport is None or self.transport.is_closing():
            return
        if self._link.stalled or (self.other is not None and self.other._full):
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def pass_on(self) -> None:
        """Give the other end what is due, and its end of file once that was all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link.stalled or self.other is None or self.other.transport is None:
            return
        loop = asyncio.get_running_loop()
        while self._on_its_way and self._on_its_way[0][0] <= loop.time():
            self.other.transport.write(self._on_its_way.popleft()[1])
        if self._on_its_way:
            self._timer = loop.call_at(self._on_its_way[0][0], self.pass_on)
        elif self._ended:
            self.other.transport.close()

    def drop(self) -> None:
        """Close it now; nothing that is on its way arrives."""
        self._on_its_way.clear()
        if self.transport is not None:
            self.transport.abort()
