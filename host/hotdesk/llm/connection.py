"""One HTTP/1.1 connection to a provider, and the answer that comes over it: pulled, or pushed as its bytes come.

Parsed by httptools. Its own, and not a client library's, for the cost of a chunk: what arrives goes from the socket's
callback straight to whoever takes it, with no task, future or buffer between; through aiohttp a chunk costs the host
half as much again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

import httptools

__all__ = ["HIGH_WATER_BYTES", "MAX_HEAD_BYTES", "Connection", "Response", "WireError"]

HIGH_WATER_BYTES = 256 * 1024
"""How much of a body is held for who does not read; then the socket is not read any more, so the provider waits."""

MAX_HEAD_BYTES = 64 * 1024


class WireError(Exception):
    """A connection that could not be made, or broke, or said what is no HTTP. `unheard`: no byte of an answer came."""

    def __init__(self, text: str, *, unheard: bool = False) -> None:
        self.unheard = unheard
        super().__init__(text)


class Keeper(Protocol):
    """Who keeps connections: told of each that is there, is gone, or is free again."""

    connections: set[Connection]

    def give_back(self, connection: Connection) -> None: ...


class Response:
    """An answer whose status and headers are there. Its body is read by `read`, or `listen` has it pushed."""

    __slots__ = (
        "_buffer",
        "_connection",
        "_ending",
        "_error",
        "_listener",
        "_paused",
        "_size",
        "_waiter",
        "ended",
        "headers",
        "status",
    )

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers
        """Names in lower case; of several of one name, the last."""
        self.ended = False
        """All of the body has come."""
        self._connection: Connection | None = connection
        self._buffer: list[bytes] = []
        self._size = 0
        self._paused = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[bytes], None] | None = None
        self._ending: asyncio.TimerHandle | None = None

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """What came since the last read, or comes next; empty at the end. Raises `WireError`, or what `fail` said."""
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self.ended:
                return b""
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer.clear()
        self._size = 0
        self._resume()
        return data

    def listen(self, listener: Callable[[bytes], None] | None) -> None:
        """Have *listener* called with each piece of the body as it comes, and with an empty one at the end or failure.

        What had come before is read by `read` first. It must not raise. None: pieces are held for `read` again.
        """
        self._listener = listener
        if listener is not None:
            self._resume()

    @property
    def error(self) -> BaseException | None:
        """Why there is no more, where that is not the end of the body."""
        return self._error

    @property
    def waiting(self) -> bool:
        """Whether something is there to `read` at once."""
        return bool(self._buffer) or self.ended or self._error is not None

    def pause(self) -> None:
        """Read no more of the socket until somebody reads here."""
        if not self._paused and self._connection is not None:
            self._paused = True
            self._connection.transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if self._connection is not None:
                self._connection.transport.resume_reading()

    def fail(self, error: BaseException) -> None:
        """Have whoever reads get *error*; nothing more is read of the connection."""
        if self._error is None and not self.ended:
            self._error = error
        self.close()

    def let_end(self, seconds: float) -> None:
        """What still comes is of no interest; the connection is kept if the body ends within *seconds*."""
        if self._connection is not None and self._ending is None:
            self._buffer.clear()
            self._listener = _ignore
            self._resume()
            self._ending = asyncio.get_running_loop().call_later(seconds, self.close)

    def close(self) -> None:
        """Hang up, if the body has not ended. It never waits."""
        if self._ending is not None:
            self._ending.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.response = None
            connection.close()
            if self._error is None:
                self._error = WireError("it was hung up on")
            self._wake()  # another task may be reading

    def _wake(self) -> None:
        if self._listener is not None:
            self._listener(b"")
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- called by the connection ----------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        if self._listener is not None:
            self._listener(data)
            return
        self._buffer.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER_BYTES:
            self.pause()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self) -> None:
        self.ended = True
        self._resume()  # the connection goes back to the others, and its next answer is to be read
        self._connection = None
        if self._ending is not None:
            self._ending.cancel()
        self._wake()

    def broken(self, error: BaseException) -> None:
        self._error = error
        self._connection = None
        self._wake()


class Connection(asyncio.Protocol):
    """One connection. It is busy from a request to the end of its answer, and idle in the pool between."""

    __slots__ = (
        "_head",
        "_headers",
        "_headers_done",
        "_keeper",
        "_parser",
        "_until_close",
        "answer",
        "heard",
        "idle_since",
        "response",
        "transport",
    )

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.transport: asyncio.Transport
        self.response: Response | None = None
        self.answer: asyncio.Future[Response] | None = None
        self.idle_since = 0.0
        self.heard = False
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._head = 0
        self._headers_done = False
        self._until_close = False
        self.heard = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "pause_reading")
        self.transport = transport  # type: ignore[assignment]
        self._keeper.connections.add(self)

    def ask(self, request: bytes, answer: asyncio.Future[Response]) -> None:
        """Send *request*; *answer* is told when the headers of its response are there."""
        self._begin()
        self.answer = answer
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        self._head += len(data)  # set back by each piece of a body: heads, trailers and chunk lines have a bound
        if self.answer is None and self.response is None:  # idle, or hung up on: what comes now is nobody's
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._break(WireError(f"it answered with what is no HTTP: {exc}"))
            return
        if self._head > MAX_HEAD_BYTES:
            self._break(WireError(f"the head of its answer is over {MAX_HEAD_BYTES} bytes"))

    def eof_received(self) -> None:
        self._lost("it closed the connection before the end of its answer")

    def connection_lost(self, exc: Exception | None) -> None:
        self._keeper.connections.discard(self)
        self._lost(f"the connection broke: {exc}" if exc else "it closed the connection before the end of its answer")

    def _lost(self, why: str) -> None:
        if self.response is not None and self._until_close:
            response, self.response = self.response, None
            response.end()
        self._break(WireError(why, unheard=not self.heard))

    def _break(self, error: WireError) -> None:
        answer, self.answer = self.answer, None
        if answer is not None and not answer.done():
            answer.set_exception(error)
        response, self.response = self.response, None
        if response is not None:
            response.broken(error)
        self.close()

    def give_up(self, why: str) -> None:
        """Hang up, and tell whoever waits."""
        self._break(WireError(why))

    def close(self) -> None:
        """Hang up at once."""
        self.response = self.answer = None
        self._keeper.connections.discard(self)
        self.transport.abort()

    # -- called by the parser --------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("utf-8", "replace")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return  # an interim answer: the one that counts follows
        self._headers_done = True
        headers = self._headers
        self._until_close = "content-length" not in headers and "transfer-encoding" not in headers
        answer, self.answer = self.answer, None
        if answer is None or answer.done():
            return
        self.response = Response(self, status, headers)
        answer.set_result(self.response)

    def on_body(self, data: bytes) -> None:
        self._head = 0
        if self.response is not None:
            self.response.feed(data)

    def on_message_complete(self) -> None:
        if not self._headers_done:
            self._headers.clear()
            return
        response, self.response = self.response, None
        if response is None:
            return
        keep = (
            self._parser.should_keep_alive()
            and not self._until_close
            and not self.transport.get_write_buffer_size()  # else it answered before it had read the request
        )
        response.end()
        if keep:
            self._keeper.give_back(self)
        else:
            self.close()


def _ignore(data: bytes) -> None:
    pass
