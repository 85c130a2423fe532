"""How a worker leaves a port that others go on serving, so that none of its visitors' requests fails."""

from __future__ import annotations

import asyncio

from aiohttp import web

__all__ = ["Departure"]

LINGER_S = 1.0
"""How long a connection on which nothing is asked may still ask something. Who keeps one open is told to close it with
the next answer; nothing can be told to one that is silent, and it is closed after this."""

STEP_S = 0.01


class Departure:
    """Of one runner. Until `begin` it costs nothing but a look at each response."""

    def __init__(self) -> None:
        self._leaving = False
        self._hurried = asyncio.Event()

    def hurry(self) -> None:
        """Wait for nobody who has asked nothing: the whole desk stops."""
        self._hurried.set()

    async def tell(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """To be called before each response is sent: from `leave` on it is its connection's last."""
        if self._leaving and not isinstance(response, web.WebSocketResponse):
            response.force_close()
            response.headers["Connection"] = "close"

    async def leave(self, runner: web.BaseRunner) -> None:
        """Take no new connection, answer what is asked on those there are, and close the ones that ask nothing.

        Connections with a request under way, sockets and event streams are left alone.
        """
        self._leaving = True
        for site in runner.sites:
            await site.stop()
        server = runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        until = loop.time() + LINGER_S
        while any(_is_idle(one) for one in server.connections) and loop.time() < until and not self._hurried.is_set():
            await asyncio.sleep(STEP_S)
        for one in server.connections:
            if _is_idle(one):
                one.close()


def _is_idle(connection: object) -> bool:
    return getattr(connection, "_current_request", None) is None  # aiohttp has no public word for it
