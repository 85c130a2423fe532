"""News from one Redis server: sharded channels, subscribed to again after a break, with a word that there was one.

What is published while nobody is connected is gone, so whoever listens reads the journal when `on_open` says so.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from redis.asyncio.connection import Connection
from redis.exceptions import MovedError, RedisError

from ..logs import get_log
from .redis_wire import own_task

__all__ = ["News"]

QUIET_S = 1.0
"""A connection that said nothing for so long is asked whether it is there."""

DEAD_S = 2.5
"""One that says nothing then, for so long in all, is given up."""

CHANNELS = 512
"""How many channels one command names."""


class News:
    """The channels of one server. *hear* gets each message; *on_open* runs once all channels are confirmed again.

    A server of a Cluster has *slot_of*, which gives the slot of a channel, and *moved*, which is told of a channel
    that is not heard here any more, for its slot is another server's.
    """

    def __init__(
        self,
        open: Callable[[], Awaitable[Connection]],
        *,
        hear: Callable[[str, bytes], None],
        on_open: Callable[[], None],
        on_close: Callable[[], None],
        confirmed: Callable[[str], None],
        slot_of: Callable[[str], int] | None = None,
        moved: Callable[[str], None] | None = None,
    ) -> None:
        self._open = open
        self._hear = hear
        self._on_open = on_open
        self._on_close = on_close
        self._confirmed = confirmed
        self._slot_of = slot_of
        self._moved = moved
        self.wanted: dict[str, bool] = {}
        """The channels, and whether each is confirmed."""

        self._awaited: set[str] = set()
        """Those that a new connection asked for first and that are not confirmed yet."""

        self._changes: dict[str, bool] = {}
        self._writing: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard_at = 0.0
        self._opened = False
        self._closed = False
        self._wake = asyncio.Event()

    def start(self) -> None:
        if self._task is None:
            self._task = own_task(self._run())

    @property
    def opened(self) -> bool:
        """All channels have been confirmed since the connection was made."""
        return self._opened

    async def wait_open(self) -> None:
        """Wait until all channels are confirmed, or none ever will be."""
        while not self._opened and not self._closed:
            self._wake.clear()
            await self._wake.wait()

    def subscribe(self, channel: str) -> None:
        """Hear *channel* from now on; `confirmed` tells when that is so."""
        if channel not in self.wanted:
            self.wanted[channel] = False
            self._change(channel, True)
        elif self.wanted[channel]:
            self._confirmed(channel)

    def unsubscribe(self, channel: str) -> None:
        if self.wanted.pop(channel, None) is not None:
            self._change(channel, False)

    def forget(self, channel: str) -> None:
        """Like `unsubscribe`, where the server is not to be told: the channel's slot is another's by now."""
        self.wanted.pop(channel, None)
        self._changes.pop(channel, None)
        self._confirm(channel)

    def _change(self, channel: str, on: bool) -> None:
        if self._connection is None:
            return  # all that is wanted is subscribed to once there is one
        self._changes[channel] = on
        if self._writing is None:
            self._writing = own_task(self._write_changes())

    async def _write_changes(self) -> None:
        try:
            while self._changes and (connection := self._connection) is not None:
                changes, self._changes = self._changes, {}
                on = [channel for channel, wanted in changes.items() if wanted]
                off = [channel for channel, wanted in changes.items() if not wanted]
                await self._send(connection, "SSUBSCRIBE", on)
                await self._send(connection, "SUNSUBSCRIBE", off)
        except (RedisError, OSError):
            pass  # the reader sees it too, and begins anew
        finally:
            self._writing = None

    async def _send(self, connection: Connection, command: str, channels: list[str]) -> None:
        commands = [(command, *group) for group in self._groups(channels)]
        if commands and connection.is_connected:  # else the library would connect once more, and nobody would read it
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)

    def _groups(self, channels: list[str]) -> Iterable[list[str]]:
        """Channels that may stand in one command: in a Cluster, those of one slot."""
        if self._slot_of is None:
            return [channels[start : start + CHANNELS] for start in range(0, len(channels), CHANNELS)]
        groups: dict[int, list[str]] = {}
        for channel in channels:
            groups.setdefault(self._slot_of(channel), []).append(channel)
        return groups.values()

    async def _run(self) -> None:
        wait_s = 0.05
        while True:
            try:
                self._connection = await self._open()
                wait_s = 0.05
                await self._listen(self._connection)
            except (RedisError, OSError, TimeoutError):
                pass
            except Exception as exc:  # a fault of ours in one message must not end all listening
                get_log().error("news_failed", exc_info=exc)
            finally:
                connection, self._connection = self._connection, None
                self._changes.clear()
                self._awaited.clear()
                for channel in self.wanted:
                    self.wanted[channel] = False
                if self._opened:
                    self._opened = False
                    self._on_close()
                if connection is not None:
                    try:
                        await connection.disconnect(nowait=True)
                    except Exception:  # it is gone, however that was
                        pass
            await asyncio.sleep(wait_s)
            wait_s = min(0.3, wait_s * 2)

    async def _listen(self, connection: Connection) -> None:
        self._awaited = set(self.wanted)
        await self._send(connection, "SSUBSCRIBE", list(self.wanted))
        self._heard_at = time.monotonic()
        watching = own_task(self._watch(connection))
        try:
            if not self._awaited:
                self._now_open()
            while True:
                try:
                    answer = await connection.read_response(timeout=math.inf)
                except MovedError as exc:  # to a subscription that came too late
                    self._slot_moved(exc.slot_id)
                    continue
                self._heard_at = time.monotonic()
                if isinstance(answer, list):
                    self._take(answer)
        finally:
            watching.cancel()

    def _take(self, answer: list[Any]) -> None:
        kind = answer[0]
        if kind == b"smessage":
            self._hear(answer[1].decode(), answer[2])
        elif kind == b"ssubscribe":
            channel = answer[1].decode()
            if self.wanted.get(channel) is False:
                self.wanted[channel] = True
                self._confirmed(channel)
            self._confirm(channel)
        elif kind == b"sunsubscribe" and self.wanted.get(answer[1].decode()):
            self._let_go(answer[1].decode())

    def _slot_moved(self, slot: int) -> None:
        if self._slot_of is None:
            raise OSError("the server is one of a Cluster; write redis+cluster://")
        for channel in [channel for channel in self.wanted if self._slot_of(channel) == slot]:
            self._let_go(channel)

    def _let_go(self, channel: str) -> None:
        """The server says that it is not the one for *channel*."""
        if self._moved is None:
            raise OSError("the server ended a subscription")
        self.forget(channel)
        self._moved(channel)

    def _confirm(self, channel: str) -> None:
        if channel in self._awaited:
            self._awaited.remove(channel)
            if not self._awaited and not self._opened:
                self._now_open()

    def _now_open(self) -> None:
        self._opened = True
        self._wake.set()
        self._on_open()

    async def _watch(self, connection: Connection) -> None:
        """A server that stands still, or a cable that is cut, says nothing: ask, and give up."""
        try:
            while True:
                await asyncio.sleep(QUIET_S / 2)
                quiet_s = time.monotonic() - self._heard_at
                if quiet_s > DEAD_S:
                    await connection.disconnect(nowait=True)
                    return
                if quiet_s > QUIET_S and connection.is_connected:
                    await connection.send_command("PING", check_health=False)
        except (RedisError, OSError):
            pass

    async def drop(self) -> None:
        """Give the connection up; the next one is made at once, perhaps to another server."""
        connection = self._connection
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        self._closed = True
        self._wake.set()
        for task in (self._task, self._writing):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
