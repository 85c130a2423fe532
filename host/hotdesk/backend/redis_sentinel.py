"""Which server is the master: asked of all sentinels at once, so that none that is down keeps the others waiting."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

from redis.asyncio.connection import Connection
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError

from ..errors import BackendUnavailable
from .redis_url import RedisUrl
from .redis_wire import Command, Lane, Scripts, connect

__all__ = ["Sentinels"]

ASK_S = 0.5
"""How long the first sentinel has to answer."""

LATECOMER_S = 0.05
"""How long the others have then: one of them may know of a newer master."""


STALE_S = 10.0
"""How long those that know an older master only are not believed, once a newer was heard of. They tell one another
every 2 s; after a longer time somebody has set them up anew, and their count began anew."""


class Sentinels:
    """The sentinels of a URL. They are logged in to with its user and password, where they ask for one."""

    def __init__(self, url: RedisUrl, scripts: Scripts) -> None:
        self._url = url
        self._bare = dataclasses.replace(url, user=None, password=None, database=0)
        self._lanes = [
            Lane(lambda at=at: self._open(*at), name=url.text, scripts=scripts)  # type: ignore[misc]
            for at in url.hosts
        ]

        self._epoch = 0
        self._heard_at = 0.0

    async def _open(self, host: str, port: int) -> Connection:
        connection = await connect(self._bare, host, port, scripts=None)
        try:
            await connection.send_command("PING", check_health=False)
            await connection.read_response()
            return connection
        except AuthenticationError:
            await connection.disconnect(nowait=True)
            if self._url.password is None:
                raise
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return await connect(dataclasses.replace(self._url, database=0), host, port, scripts=None)

    async def find_master(self) -> tuple[str, int]:
        """Where the master is, by the newest that any sentinel knows.

        Raises the library's `ConnectionError` when none answers, and while the master is down and no other is one yet.
        """
        asked = [asyncio.ensure_future(self._ask(lane)) for lane in self._lanes]
        try:
            waiting = set(asked)
            wait_s = ASK_S
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                if any(one.exception() is None for one in done):
                    wait_s = LATECOMER_S
        finally:
            for one in asked:
                one.cancel()
        answers = [one.result() for one in asked if one.done() and not one.cancelled() and one.exception() is None]
        if not answers:
            reasons = (
                f"sentinel {host}:{port}: {_reason(one)}"
                for (host, port), one in zip(self._url.hosts, asked, strict=True)
            )
            raise RedisConnectionError("; ".join(reasons))
        epoch, up, host, port = max(answers)
        if epoch < self._epoch and time.monotonic() < self._heard_at + STALE_S:
            raise RedisConnectionError("only sentinels that know an older master answer")
        self._epoch, self._heard_at = epoch, time.monotonic()
        if not up:
            raise RedisConnectionError(f"the sentinels say that the master {host}:{port} is down")
        return host, port

    async def _ask(self, lane: Lane) -> tuple[int, bool, str, int]:
        """The epoch of what this sentinel knows, whether the master is up, and its address."""
        flat, (host, port) = await asyncio.gather(
            self._send(lane, "MASTER"), self._send(lane, "GET-MASTER-ADDR-BY-NAME")
        )
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        # A sentinel that fails over gives the new master's address some time before it counts it as the master.
        old = (host, port) == (fields[b"ip"], fields[b"port"])
        up = not old or not {b"s_down", b"o_down"} & set(fields[b"flags"].split(b","))
        return int(fields[b"config-epoch"]), up, host.decode(), int(port)

    def _send(self, lane: Lane, what: str) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        lane.send(Command(("SENTINEL", what, self._url.service), future, -1, False))
        return future

    async def aclose(self) -> None:
        await asyncio.gather(*(lane.aclose(wait_s=0.1) for lane in self._lanes))


def _reason(asked: asyncio.Future[Any]) -> str:
    """Why a sentinel gave no answer."""
    exc = asked.exception() if asked.done() and not asked.cancelled() else None
    if isinstance(exc, BackendUnavailable):
        return exc.reason
    return "it does not answer" if exc is None else str(exc)
