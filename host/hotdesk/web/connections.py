"""What serves one connection: aiohttp's own handler, which answers what is no HTTP in the one error shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from ..errors import DoorError
from .wire import json_response

__all__ = ["Site", "connections"]

MESSAGE_CHARS = 300


class _Connection(RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp would answer in plain text; whatever reaches a door is answered there."""
        plain = super().handle_error(request, status, exc, message)
        if status >= 500:
            error = DoorError("internal_error", "the host failed to answer this request")
        else:
            said = " ".join((message or "it can't be read").split())[:MESSAGE_CHARS]
            error = DoorError("bad_http", said, "this door speaks HTTP/1.1; a line of it has at most 8 KiB")
        response = json_response({"error": error.body()}, plain.status)
        response.force_close()
        return response


def connections(server: web.Server) -> Callable[[], RequestHandler]:
    """Makes the protocol of each new connection of *server*."""
    loop = asyncio.get_running_loop()
    return partial(_Connection, server, loop=loop, logger=_http_log(), access_log=None)  # type: ignore[arg-type]


class Site(web.SockSite):
    """Takes the connections of a socket that is bound."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(connections(server), sock=self._sock, backlog=self._backlog)


class _NotTheirs(logging.Filter):
    """Bytes that are no HTTP are a 400 to who sent them; a traceback each would let anybody fill the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


def _http_log() -> logging.Logger:
    """For what aiohttp has to say of the doors itself."""
    log = logging.getLogger("hotdesk.http")
    if not log.filters:
        log.addFilter(_NotTheirs())
    return log
