"""How a worker leaves a port that others go on serving, so that none of its visitors' requests fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

__all__ = ["Departure"]

LINGER_S = 1.0
"""How long a connection on which nothing is asked may still ask something. Who keeps one open is told to close it with
the next answer; nothing can be told to one that is silent, and it is closed after this."""

STEP_S = 0.01


class Departure:
    """Of one worker. Until `close_port` it costs nothing but a look at each response."""

    def __init__(self) -> None:
        self._leaving = False
        self._hurried = asyncio.Event()

    @property
    def hurried(self) -> bool:
        """Whether the whole desk stops, so that there is nobody else to come back to."""
        return self._hurried.is_set()

    def hurry(self) -> None:
        """The whole desk stops: wait for nobody here."""
        self._hurried.set()

    async def tell(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """To be called before each response is sent."""
        if self._leaving and not isinstance(response, web.WebSocketResponse):
            response.force_close()
            response.headers["Connection"] = "close"

    async def close_port(self, runner: web.BaseRunner) -> None:
        """Take no new connection; every answer is its connection's last from now on."""
        self._leaving = True
        for site in runner.sites:
            await site.stop()

    async def answer_all(self, runner: web.BaseRunner, seconds: float) -> None:
        """Answer within *seconds* whatever is asked on the connections there are, and close them.

        Messages are to be taken until this returns. Sockets and event streams, and what is answered only later, are
        left alone.
        """
        server = runner.server
        assert server is not None
        await self._wait_none(server, _is_idle, LINGER_S)
        for one in server.connections:
            if _is_idle(one):
                one.force_close()
        await self._wait_none(server, _is_unanswered, seconds)

    async def _wait_none(self, server: web.Server, kind: Callable[[RequestHandler], bool], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while any(map(kind, server.connections)) and loop.time() < until:
            try:
                async with asyncio.timeout(STEP_S):
                    await self._hurried.wait()
                return
            except TimeoutError:
                continue


# aiohttp has no public word for what a connection is at.


def _is_idle(connection: RequestHandler) -> bool:
    return connection._current_request is None and not connection._messages


def _is_unanswered(connection: RequestHandler) -> bool:
    request = connection._current_request
    return bool(connection._messages) or (request is not None and request.writer.output_size == 0)
