"""Visitors who read answers as they stream, note when each piece came, and judge what they were told.

Three kinds with the same shape: of a desk's WebSocket, of the bare bot's, and readers straight from the model server,
which show how late the run itself is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import msgspec
from tests.load.client import request_bytes
from tests.load.llm_bare import TEXT
from tests.load.sockets import WebSocket, open_socket

__all__ = [
    "FAULTS",
    "BotVisitor",
    "DeskVisitor",
    "Heard",
    "ModelReader",
    "Visitor",
    "faults_of",
    "tokens_of",
    "wait_first",
    "wait_for",
]

LOOK_S = 0.02

FAULTS = ("unanswered", "failed", "lost", "doubled", "reordered", "kept otherwise than shown")

_numbers = count()
_now = time.monotonic_ns


class Heard:
    """What came of one message: the pieces, with when each came, and the reply that was kept."""

    __slots__ = ("asked_ns", "at_ns", "error", "reply", "texts")

    def __init__(self) -> None:
        self.asked_ns = _now()
        self.at_ns: list[int] = []
        self.texts: list[str] = []
        self.reply: str | None = None
        self.error: str | None = None

    @property
    def ended(self) -> bool:
        return self.reply is not None or self.error is not None

    @property
    def tokens(self) -> int:
        return sum(text.count(" ") for text in self.texts)


class Visitor:
    """Asks when it is told to, and again at the end of an answer while `more` says so."""

    __slots__ = ("heard", "more")

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.more = 0

    def ask(self, more: int = 0) -> None:
        """Send a message, and *more* after it, each when the one before was answered."""
        self.more = more
        self.heard.append(Heard())
        self._send()

    @property
    def idle(self) -> bool:
        return not self.heard or (self.heard[-1].ended and not self.more)

    def _ended(self) -> None:
        if self.more > 0:
            self.ask(self.more - 1)

    async def come(self, port: int, conversation: str) -> None:
        """Connect, for that conversation."""
        raise NotImplementedError

    def leave(self) -> None:
        """Disconnect, without ceremony."""
        raise NotImplementedError

    def _send(self) -> None:
        raise NotImplementedError


class _Frame(msgspec.Struct, frozen=True):
    type: str
    text: str = ""
    code: str = ""


_frame = msgspec.json.Decoder(_Frame).decode


class DeskVisitor(Visitor):
    """At `/v1/ws`."""

    __slots__ = ("_socket",)

    def __init__(self) -> None:
        super().__init__()
        self._socket: WebSocket

    async def come(self, port: int, conversation: str) -> None:
        self._socket = await open_socket(port, f"/v1/ws?conversation={conversation}", self._received)

    def _send(self) -> None:
        self._socket.send(b'{"type":"message","id":"m%d","text":"%b"}' % (next(_numbers), TEXT.encode()))

    def _received(self, socket: WebSocket, text: bytes) -> None:
        now, frame, heard = _now(), _frame(text), self.heard[-1]
        if frame.type == "chunk":
            heard.at_ns.append(now)
            heard.texts.append(frame.text)
        elif frame.type == "reply":
            heard.reply = frame.text
            self._ended()
        elif frame.type == "error":
            heard.error = frame.code
            self._ended()

    def leave(self) -> None:
        self._socket.transport.abort()


class BotVisitor(Visitor):
    """At the bare bot's `/ws`: each frame is a delta, an empty one is the end."""

    __slots__ = ("_socket",)

    def __init__(self) -> None:
        super().__init__()
        self._socket: WebSocket

    async def come(self, port: int, conversation: str) -> None:
        self._socket = await open_socket(port, "/ws", self._received)

    def _send(self) -> None:
        self._socket.send(b'{"text":"%b"}' % TEXT.encode())

    def _received(self, socket: WebSocket, text: bytes) -> None:
        now, heard = _now(), self.heard[-1]
        if text:
            heard.at_ns.append(now)
            heard.texts.append(text.decode())
        else:
            heard.reply = "".join(heard.texts)
            self._ended()

    def leave(self) -> None:
        self._socket.transport.abort()


class ModelReader(Visitor, asyncio.Protocol):
    """Asks the model server itself, with no desk between."""

    def __init__(self, path: str) -> None:
        super().__init__()
        body = b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"messages":[]}'
        self._request = request_bytes("POST", path, body)
        self._buffer = b""
        self._transport: asyncio.Transport

    async def come(self, port: int, conversation: str) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def _send(self) -> None:
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now, heard = _now(), self.heard[-1]
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        for event in events:
            at = event.find(b'"content":"') + 11
            if at > 10 and (text := event[at : event.index(b'"', at)]):
                heard.at_ns.append(now)
                heard.texts.append(text.decode())
            elif event.endswith(b"data: [DONE]"):
                heard.reply = "".join(heard.texts)
        if heard.reply is not None and self._buffer.endswith(b"0\r\n\r\n"):
            self._buffer = b""
            self._ended()

    def leave(self) -> None:
        self._transport.abort()


async def wait_for(visitors: Sequence[Visitor], seconds: float) -> None:
    """Wait until all have their answers, or the time is up; `faults_of` tells who has not."""
    await _wait(lambda: all(visitor.idle for visitor in visitors), seconds)


async def wait_first(visitors: Sequence[Visitor], seconds: float) -> None:
    """Wait until every answer has begun, or the time is up."""
    await _wait(lambda: all(visitor.heard[-1].texts for visitor in visitors), seconds)


async def _wait(condition: Callable[[], bool], seconds: float) -> None:
    for _ in range(round(seconds / LOOK_S)):
        if condition():
            return
        await asyncio.sleep(LOOK_S)


def tokens_of(visitors: Iterable[Visitor]) -> int:
    """How many tokens they have heard."""
    return sum(heard.tokens for visitor in visitors for heard in visitor.heard)


def faults_of(visitors: Iterable[Visitor], tokens: int) -> Counter[str]:
    """What is wrong with the answers, each of which should be the tokens 0 to *tokens*, by `FAULTS`."""
    found: Counter[str] = Counter()
    for visitor in visitors:
        for heard in visitor.heard:
            if not heard.ended:
                found["unanswered"] += 1
            if heard.error is not None:
                found["failed"] += 1
            if heard.reply is None:
                continue
            shown = "".join(heard.texts)
            numbers = [int(word.partition(":")[0]) for word in shown.split()]
            found["lost"] += len(set(range(tokens)) - set(numbers))
            found["doubled"] += len(numbers) - len(set(numbers))
            found["reordered"] += numbers != sorted(numbers)
            found["kept otherwise than shown"] += heard.reply != shown
    return found
