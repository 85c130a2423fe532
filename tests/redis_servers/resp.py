"""The least of a Redis client: commands over plain streams, in RESP 2."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from typing import Any

__all__ = ["Argument", "Connection", "Reply", "ReplyError"]

Argument = str | bytes | int | float
Reply = Any
"""Text (bytes that are not UTF-8 stand in it as lone surrogates), an int, None, or a list of these."""

REPLY_S = 10.0
"""The longest that a command waits for its reply; nothing in a test's server takes a hundredth of it."""

LIMIT_BYTES = 2**26


class ReplyError(Exception):
    """The server answered with an error; the text is its own, which begins with the kind: `NOSCRIPT …`."""


class Connection:
    """One connection. Not for two tasks at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(
        cls, address: str, port: int, *, password: str | None = None, tls: ssl.SSLContext | None = None
    ) -> Connection:
        """Connect, and say the password if there is one. Raises `OSError`, `ReplyError`, `TimeoutError`."""
        async with asyncio.timeout(REPLY_S):
            connection = cls(*await asyncio.open_connection(address, port, ssl=tls, limit=LIMIT_BYTES))
        if password is not None:
            try:
                await connection.command("AUTH", password)
            except BaseException:
                await connection.aclose()
                raise
        return connection

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drop the connection."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def command(self, *args: Argument, timeout_s: float = REPLY_S) -> Reply:
        """Run one command and give its reply.

        Raises `ReplyError`, `TimeoutError`, `ConnectionError` and `EOFError`; after a timeout the connection is of no
        more use.
        """
        (reply,) = await self.pipeline([args], timeout_s=timeout_s)
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    async def pipeline(self, commands: Sequence[Sequence[Argument]], *, timeout_s: float = REPLY_S) -> list[Reply]:
        """Send the commands in one piece and give their replies; one that failed is a `ReplyError` among them."""
        self._writer.write(b"".join(map(_packed, commands)))
        async with asyncio.timeout(timeout_s):
            await self._writer.drain()
            return [await self._read() for _ in commands]

    async def next_push(self, *, timeout_s: float = REPLY_S) -> Reply:
        """What the server says next by itself: a message of a channel that was subscribed to."""
        async with asyncio.timeout(timeout_s):
            return await self._read()

    async def _read(self) -> Reply:
        line = (await self._reader.readuntil(b"\r\n"))[:-2]
        kind, rest = line[:1], line[1:]
        match kind:
            case b"+":
                return _text(rest)
            case b"-":
                return ReplyError(_text(rest))
            case b":":
                return int(rest)
            case b"$":
                length = int(rest)
                return None if length < 0 else _text((await self._reader.readexactly(length + 2))[:-2])
            case b"*":
                length = int(rest)
                return None if length < 0 else [await self._read() for _ in range(length)]
        raise ConnectionError(f"not a reply: {line[:80]!r}")


def _packed(args: Sequence[Argument]) -> bytes:
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        data = arg if isinstance(arg, bytes) else str(arg).encode(errors="surrogateescape")
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
