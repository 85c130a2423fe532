"""The way to one provider: connections that are made, kept alive and used again."""

from __future__ import annotations

import asyncio
import base64
import contextvars
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohappyeyeballs

from .connection import MAX_HEAD_BYTES, Connection, Response, WireError

__all__ = ["Response", "Wire", "WireError"]

KEEP_ALIVE_S = 60.0
"""How long an unused connection is kept."""

HAPPY_EYEBALLS_S = 0.25
"""How long an address is tried before the next is tried beside it (RFC 8305)."""

monotonic = time.monotonic


class Wire:
    """The way to one URL. Connections are kept and used again, the one used last first."""

    def __init__(self, url: str, headers: Iterable[tuple[str, str]], *, proxy: str = "", connect_s: float) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self._secure else 80)
        self._connect_s = connect_s
        self._proxy = urlsplit(proxy) if proxy else None
        self._context = _tls() if self._secure else None
        host = f"[{self.host}]" if ":" in self.host else self.host
        netloc = host if parts.port is None else f"{host}:{parts.port}"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"Host: {netloc}", *(f"{name}: {value}" for name, value in headers)]
        if self._proxy is not None and not self._secure:
            path = f"{parts.scheme}://{netloc}{path}"
            lines += _proxy_authorization(self._proxy)
        self.shown_url = f"{parts.scheme}://{netloc}{parts.path}"
        """Without what is not for a log: user, password, query."""
        self._head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, "Content-Length: "]).encode("latin-1")
        self.connections: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._expiry: asyncio.TimerHandle | None = None
        self.closed = False
        """Everybody was hung up on, and nothing is asked any more."""

    async def post(self, body: bytes) -> Response:
        """Send *body*, and return the answer when its headers are there. Raises `WireError`, `OSError`, `TimeoutError`.

        A kept connection that the other side had closed meanwhile is no failure: the request goes out on another.
        """
        request = b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
        while True:
            if self.closed:
                raise WireError("the host closes it")
            connection = self._reuse()
            fresh = connection is None
            if connection is None:
                connection = await self._connect()
            answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
            connection.ask(request, answer)
            try:
                return await answer
            except WireError as exc:
                if fresh or not exc.unheard:
                    raise
            except BaseException:
                if answer.done() and not answer.cancelled() and answer.exception() is None:
                    answer.result().close()  # the connection may be somebody else's by now
                else:
                    connection.close()
                raise

    def _reuse(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection in self.connections and not connection.transport.is_closing():
                return connection
        return None

    def give_back(self, connection: Connection) -> None:
        """A connection is free."""
        if self.closed or connection.transport.is_closing():
            connection.close()
            return
        connection.idle_since = monotonic()
        self._idle.append(connection)
        if self._expiry is None:
            self._expiry = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        now = monotonic()
        while self._idle and (self._idle[0] not in self.connections or now - self._idle[0].idle_since > KEEP_ALIVE_S):
            connection = self._idle.popleft()
            if connection in self.connections:
                connection.close()
        if self._idle:
            wait = max(0.1, KEEP_ALIVE_S - (now - self._idle[0].idle_since))
            self._expiry = asyncio.get_running_loop().call_later(wait, self._expire)

    async def _connect(self) -> Connection:
        """A new connection, made in a context of its own: it outlives the turn that wanted it."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._open(), context=contextvars.Context())
        try:
            return await task
        except asyncio.CancelledError:
            task.cancel()
            task.add_done_callback(_put_down)
            raise

    async def _open(self) -> Connection:
        async with asyncio.timeout(self._connect_s):
            far = (self.host, self.port) if self._proxy is None else _address(self._proxy)
            sock = await _dial(*far)
            try:
                if self._proxy is not None and self._secure:
                    await self._tunnel(sock, self._proxy)
                loop = asyncio.get_running_loop()
                server = self.host if self._secure else None
                _, connection = await loop.create_connection(
                    lambda: Connection(self), sock=sock, ssl=self._context, server_hostname=server
                )
            except BaseException:
                sock.close()
                raise
            return connection

    async def _tunnel(self, sock: socket.socket, proxy: Any) -> None:
        """Ask the proxy for a tunnel (RFC 9110, CONNECT)."""
        loop = asyncio.get_running_loop()
        far = f"{self.host}:{self.port}"
        lines = [f"CONNECT {far} HTTP/1.1", f"Host: {far}", *_proxy_authorization(proxy), "", ""]
        await loop.sock_sendall(sock, "\r\n".join(lines).encode("latin-1"))
        said = b""
        while b"\r\n\r\n" not in said:
            part = await loop.sock_recv(sock, 4096)
            said += part
            if not part or len(said) > MAX_HEAD_BYTES:
                raise WireError("the proxy closed the connection")
        status = [*said.partition(b"\r\n")[0].split(), b"?", b"?"][1] if said.startswith(b"HTTP/1.") else b"?"
        if status != b"200":
            raise WireError(f"the proxy answered with status {status[:20].decode('latin-1')}")

    async def aclose(self) -> None:
        """Hang up on everybody."""
        self.closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        for connection in list(self.connections):
            connection.give_up("the host closes it")
        await asyncio.sleep(0)


def _put_down(task: asyncio.Task[Connection]) -> None:
    """A connection that was given up came about all the same."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _dial(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as exc:
        raise WireError(f"{host!r} is no name of a host") from exc
    sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _address(proxy: Any) -> tuple[str, int]:
    return proxy.hostname or "", proxy.port or 80


def _proxy_authorization(proxy: Any) -> list[str]:
    if proxy.username is None:
        return []
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return [f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}"]
