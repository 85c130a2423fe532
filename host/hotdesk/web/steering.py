"""Has each visitor's connection served by the worker that runs its conversation's turns.

The kernel spreads new connections over the workers of a desk without knowing what they are for. Most are one visitor's,
in one conversation: its turns would cross from the worker that has the visitor to the one that owns the conversation,
and back, each time. So a worker looks at the first line of a new connection, without taking it out of the socket, and
passes the connection on (`SCM_RIGHTS`) where a sibling owns the conversation that is named there. It is a matter of
cost alone: every worker serves every conversation, and whatever is unclear stays where it came in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from urllib.parse import unquote, unquote_plus

from aiohttp import web

from ..logs import get_log
from .connections import connections
from .port import BACKLOG

__all__ = ["SteeredSite", "conversation_in"]

LOOK_S = 1.0
"""How long a new connection may say nothing; then it is served where it is."""

HEAD_BYTES = 2048
"""So much of a request's first line is looked at."""

FULL_S = 1.0
"""How long nothing is taken after something could not be, for this process has no file left for it say."""

LAST_S = 1.0
"""How long a worker that leaves tries to take what was passed to it before."""

FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

PEEK = socket.MSG_PEEK | getattr(socket, "MSG_CMSG_CLOEXEC", 0)
FILE_BYTES = 4
"""Of a passed file's number."""

MESSAGES = b"/v1/conversations/"
SOCKETS = b"/v1/ws"
NAME = b"conversation="

FindSibling = Callable[[str], str | None]
"""The entrance of the worker that a conversation is best served by; None where that is this one, or no sibling."""


def conversation_in(head: bytes) -> str | None:
    """The conversation that the first line of a request names; None where there is none to be seen."""
    words = head.partition(b"\r\n")[0].split(b" ", 2)
    if len(words) < 3:  # a line that goes on
        return None
    path, _, query = words[1].partition(b"?")
    if path.startswith(MESSAGES):
        return unquote(path[len(MESSAGES) :].partition(b"/")[0].decode("latin-1")) or None
    if path == SOCKETS:
        for pair in query.split(b"&"):
            if pair.startswith(NAME):
                return unquote_plus(pair[len(NAME) :].decode("latin-1")) or None
    return None


class SteeredSite(web.BaseSite):
    """Takes the connections of *sock*, and those that siblings pass to *entrance*, and passes on what is a sibling's.

    `stop` takes no more of either. What came before is served, also what a sibling passed in at the very end: none is
    lost between two workers. Where no file is left for one, siblings keep what they have, and what they passed in
    before waits. Raises `OSError` on `start` when *entrance* can't be listened at.
    """

    def __init__(
        self, runner: web.BaseRunner, sock: socket.socket, *, entrance: str, find: FindSibling,
        passed: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(runner)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._entrance = entrance
        self._find = find
        self._passed = passed
        assert runner.server is not None
        self._make = connections(runner.server)
        self._inner: socket.socket | None = None
        self._silent: dict[socket.socket, asyncio.TimerHandle] = {}
        """Connections of which nothing was read yet."""

        self._ways_in: set[socket.socket] = set()
        self._ways_out: dict[str, socket.socket] = {}
        self._taking: set[asyncio.Task[None]] = set()
        self._resting = False
        self._stopped = False
        host, port = sock.getsockname()[:2]
        self._name = f"http://{host}:{port}"

    @property
    def name(self) -> str:
        return self._name

    async def start(self) -> None:
        await super().start()
        self._open_entrance()
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock, self._accept)

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for connection in tuple(self._silent):
            self._keep(connection)
        # What was let in before this is still to be had, and whoever comes later is refused: nothing in between.
        self._shut()
        until = self._loop.time() + LAST_S
        while self._take_all() and self._loop.time() < until:  # noqa: ASYNC110 - nobody tells when a file is free
            await asyncio.sleep(FULL_S / 20)  # until a visitor who goes leaves a file
        for way in (*self._ways_in, *([self._inner] if self._inner is not None else ())):
            self._loop.remove_reader(way)
            way.close()
        for entrance in tuple(self._ways_out):
            self._close_way(entrance)
        Path(self._entrance).unlink(missing_ok=True)
        while self._taking:
            await asyncio.wait(self._taking)
        await super().stop()

    # -- who connects ----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._rest(exc)
                return
            connection.setblocking(False)
            if not self._look(connection):
                self._silent[connection] = self._loop.call_later(LOOK_S, self._keep, connection, context=Context())
                self._loop.add_reader(connection, self._look, connection)

    def _rest(self, exc: OSError) -> None:
        """Nothing can be taken for a while: not to be called again at once, listen to nobody."""
        if self._resting:
            return
        self._resting = True
        if self._stopped:
            return
        get_log().error("connection_not_taken", problem=exc.strerror or str(exc))
        for sock in (self._sock, *self._ways_in, *([self._inner] if self._inner is not None else ())):
            self._loop.remove_reader(sock)
        self._shut()
        self._loop.call_later(FULL_S, self._go_on, context=Context())

    def _go_on(self) -> None:
        """Take what waits; siblings may pass in more only where there was a file for all of it."""
        if self._stopped or self._take_all():
            return
        self._accept()
        if self._resting:
            return
        try:
            self._open_entrance()
        except OSError as exc:
            self._rest(exc)
            return
        self._loop.add_reader(self._sock, self._accept)

    def _shut(self) -> None:
        """Siblings can pass nothing in any more; what they did is still there."""
        for way in (*self._ways_in, *([self._inner] if self._inner is not None else ())):
            with contextlib.suppress(OSError):
                way.shutdown(socket.SHUT_RD)

    def _take_all(self) -> bool:
        """Take all that was passed in; whether something could not be."""
        self._resting = False
        self._let_siblings_in()
        self._shut()  # those who were let in just now, too
        for way in tuple(self._ways_in):
            self._take_in(way)
        return self._resting

    def _look(self, connection: socket.socket) -> bool:
        """Decide who serves *connection*; False while it has said nothing."""
        try:
            head = connection.recv(HEAD_BYTES, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # reset already, as whoever serves it finds out
            head = b""
        conversation = conversation_in(head)
        entrance = self._find(conversation) if conversation is not None else None
        if entrance is not None and self._pass(connection, entrance):
            self._settle(connection)
            connection.close()
            self._passed()
        else:
            self._keep(connection)
        return True

    def _settle(self, connection: socket.socket) -> None:
        timer = self._silent.pop(connection, None)
        if timer is not None:
            timer.cancel()
            self._loop.remove_reader(connection)

    def _keep(self, connection: socket.socket) -> None:
        """Serve *connection* here."""
        self._settle(connection)
        task = self._loop.create_task(self._serve(connection), context=Context())
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _serve(self, connection: socket.socket) -> None:
        if self._runner.server is None:
            connection.close()
            return
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except OSError as exc:
            connection.close()
            get_log().error("connection_not_taken", problem=exc.strerror or str(exc))

    # -- from one worker to another --------------------------------------------------------------------------

    def _pass(self, connection: socket.socket, entrance: str) -> bool:
        """Give *connection* to a sibling; False where it can't take it just now."""
        way = self._ways_out.get(entrance)
        try:
            if way is None:
                way = self._open_way(entrance)
            socket.send_fds(way, [b"\0"], [connection.fileno()])
        except BlockingIOError:  # so many wait there already that it is quicker here
            return False
        except OSError:  # it leaves, has died, or has no file left for it
            self._close_way(entrance)
            return False
        return True

    def _open_way(self, entrance: str) -> socket.socket:
        way = socket.socket(socket.AF_UNIX)
        try:
            way.setblocking(False)
            way.connect(entrance)
        except BaseException:
            way.close()
            raise
        self._ways_out[entrance] = way
        self._loop.add_reader(way, self._close_way, entrance)  # nothing is said on it but that it ends
        return way

    def _close_way(self, entrance: str) -> None:
        way = self._ways_out.pop(entrance, None)
        if way is not None:
            self._loop.remove_reader(way)
            way.close()

    def _open_entrance(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None
        Path(self._entrance).unlink(missing_ok=True)
        self._inner = _bind_entrance(self._entrance)
        self._loop.add_reader(self._inner, self._let_siblings_in)

    def _let_siblings_in(self) -> None:
        while self._inner is not None:
            try:
                way, _ = self._inner.accept()
            except OSError as exc:  # nobody else waits, or nobody can be let in
                if exc.errno in FULL:
                    self._rest(exc)
                return
            way.setblocking(False)
            self._ways_in.add(way)
            if not self._stopped:
                self._loop.add_reader(way, self._take_in, way)

    def _take_in(self, way: socket.socket) -> None:
        """Serve what a sibling passed. Each is looked at first: what there is no file for stays where it is."""
        while True:
            try:
                data, passed, flags, _ = way.recvmsg(1, socket.CMSG_LEN(FILE_BYTES), PEEK)
                if data and flags & socket.MSG_CTRUNC:
                    self._rest(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                    return
                way.recv(1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, passed = b"", []
            for _, _, file in passed:
                connection = socket.socket(fileno=int.from_bytes(file[:FILE_BYTES], sys.byteorder))
                connection.set_inheritable(False)
                connection.setblocking(False)
                self._keep(connection)
            if not data:
                self._loop.remove_reader(way)
                self._ways_in.discard(way)
                way.close()
                return


def _bind_entrance(path: str) -> socket.socket:
    inner = socket.socket(socket.AF_UNIX)
    try:
        inner.setblocking(False)
        inner.bind(path)
        inner.listen(BACKLOG)
    except BaseException:
        inner.close()
        raise
    return inner
