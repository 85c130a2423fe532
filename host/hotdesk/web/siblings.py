"""The workers of one desk among each other: who they are, and asking all of them one thing.

Each worker has a Unix socket that only this host's user can reach; what it answers there is in `inner`. The supervisor
tells who is there. A host that is one process has no siblings, and every question here has its own answer alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec

from ..errors import DoorError

__all__ = ["DeskState", "Roll", "Siblings", "Told", "WorkerRow", "entrance_of"]

ASK_S = 2.0
"""How long a sibling has for an answer that it has at hand. One that is stopped must not hold up the rest."""


class WorkerRow(msgspec.Struct, frozen=True):
    """One worker as its supervisor knows it. `name` is its process's own, `worker` its place, which it may inherit."""

    worker: int
    name: str
    pid: int
    path: str
    state: str
    """`starting`, `ready`, `leaving` (replaced, and finishing what it has) or `down`."""
    since: float
    """When it came into that state (Unix seconds)."""
    restarts: int
    """How often the worker in this place died and was started again."""


class Roll(msgspec.Struct, frozen=True):
    """The last restart of all workers, one by one."""

    number: int = 0
    state: str = "none"
    """`none`, `running`, `done` or `failed`."""
    replaced: int = 0
    message: str = ""


class DeskState(msgspec.Struct, frozen=True):
    """What the supervisor tells every worker whenever it changes."""

    workers: tuple[WorkerRow, ...] = ()
    roll: Roll = Roll()


class Told(msgspec.Struct, frozen=True):
    """What a sibling answered; its status is 0 when it did not."""

    row: WorkerRow
    status: int
    body: bytes

    @property
    def data(self) -> Any:
        """Its JSON; None when it did not answer."""
        try:
            return msgspec.json.decode(self.body) if self.status else None
        except msgspec.DecodeError:
            return None


def entrance_of(path: str) -> str:
    """Where siblings pass connections in, to the worker that answers them at the socket *path*."""
    return path.removesuffix(".sock") + "-in.sock"


class Siblings:
    """The other workers, from the place of one of them. *restart* asks the supervisor for a restart of all."""

    def __init__(
        self,
        worker: int | None = None,
        name: str = "",
        restart: Callable[[], Awaitable[dict[str, Any]]] | None = None,
    ) -> None:
        self.worker = worker
        """Its place; None in a host that is one process."""
        self.name = name
        self.state = DeskState()
        self._restart = restart
        self._listeners: list[Callable[[dict[str, Any]], None]] = []

    @property
    def alone(self) -> bool:
        """Whether the host is one process."""
        return self.worker is None

    def others(self) -> list[WorkerRow]:
        """The worker in every place but its own."""
        rows: dict[int, WorkerRow] = {}
        for row in self.state.workers:
            if row.worker != self.worker and row.state != "leaving":
                rows[row.worker] = row
        return [rows[place] for place in sorted(rows)]

    def entrance_to(self, pid: int | None) -> str | None:
        """Where connections are passed in to the sibling that is the process *pid*; None unless it serves."""
        for row in self.state.workers:
            if row.pid == pid and row.state == "ready" and row.name != self.name:
                return entrance_of(row.path)
        return None

    async def ask(self, method: str, path: str, *, timeout_s: float = ASK_S) -> list[Told]:
        """Ask every sibling at the same time. Never fails: who does not answer in time has the status 0."""
        return list(await asyncio.gather(*(self._ask(row, method, path, timeout_s) for row in self.others())))

    async def _ask(self, row: WorkerRow, method: str, path: str, timeout_s: float) -> Told:
        if row.state != "ready":
            return Told(row, 0, b"")
        try:
            async with (
                asyncio.timeout(timeout_s),
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(row.path)) as session,
                session.request(method, f"http://worker{path}") as response,
            ):
                return Told(row, response.status, await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError):
            return Told(row, 0, b"")

    async def restart(self) -> dict[str, Any]:
        """Have all workers replaced, one by one: the number of that restart. Raises `DoorError` where nobody can."""
        if self._restart is None:
            raise DoorError(
                "conflict",
                "this host is one process, which nobody is there to replace",
                "start it on a Redis with --workers 2 or more, or stop it and start it again",
            )
        try:
            async with asyncio.timeout(ASK_S):
                return await self._restart()
        except TimeoutError:
            raise DoorError("conflict", "the supervisor does not answer", "look at its log") from None

    # -- events ----------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Have *listener* called with the events of the others; returns how to stop it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def hear(self, event: dict[str, Any]) -> None:
        """An event of a sibling, or of the supervisor."""
        for listener in list(self._listeners):
            listener(event)
