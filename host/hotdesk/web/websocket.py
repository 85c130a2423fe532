"""`/v1/ws`: JSON text frames both ways. No task and no queue of its own for an idle visitor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web
from msgspec import Meta

from ..backend import Backend
from ..chat.elsewhere import Elsewhere
from ..chat.intake import Accepted, Intake, NewMessage
from ..chat.outbox import Event, Outbox, Reader
from ..chat.spool import Spooled
from ..chat.turns import Turns
from ..config import Config
from ..errors import BackendUnavailable, DoorError
from ..metrics import Metrics
from ..runtime.guards import host_task
from .access import Access, Visitor
from .conversations import MAX_SEQ
from .pace import Held, soft_bound
from .wire import MessageBody, Wire, check_url, conversation_of, decode, integer, to_message

__all__ = ["WebSockets"]

COME_BACK = WSCloseCode.TRY_AGAIN_LATER
"""1013: the close code of a reader that fell too far behind; it resumes with `after=`."""

PING_S = 30.0
PING_STEP_S = 0.1
"""Every visitor is pinged once in `PING_S`, a few of them at each step: the library's own heartbeat rounds its timers
to whole seconds, and twelve thousand pings in one go held the loop for 438 ms."""

CLOSE_S = 2.0
"""How long a visitor has to take its close frame."""

PONG = b'{"type":"pong"}'
BINARY = "frames are text, with JSON in them"
LOOK_S = 0.005
LOOK_EACH_S = 0.00002
"""Slow visitors are looked at this often, all in one go; more rarely the more they are, for a look costs 1 µs each."""

REPEAT_S = (0.1, 0.3, 0.6)
"""The waits between tries to read an answer that was given before: a journal that is back may take writes first."""

BROKEN = {
    WSCloseCode.PROTOCOL_ERROR: ("bad_json", "the frame breaks the WebSocket protocol"),
    WSCloseCode.INVALID_TEXT: ("bad_json", "the frame is not UTF-8"),
    WSCloseCode.MESSAGE_TOO_BIG: ("too_large", "the frame is over its limit; the setting is max_body_bytes"),
}
"""Close codes that aiohttp gives a visitor who broke the protocol, and what an error frame says before."""

_encode = msgspec.json.Encoder().encode


class InFrame(MessageBody, frozen=True, kw_only=True):
    """A frame from a visitor: `message` with a message's fields, `cancel` with the id of one, or `ping`."""

    type: Annotated[str, Meta(max_length=20)]
    text: str = ""
    to: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


def _text_frame(data: bytes) -> bytes:
    """An unmasked, uncompressed text frame (RFC 6455, 5.2)."""
    size = len(data)
    if size < 126:
        return b"\x81%c" % size + data
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2) + data
    return b"\x81\x7f" + size.to_bytes(8) + data


def _nothing_to_cancel() -> DoorError:
    return DoorError("not_found", "no turn of that message is under way")


def _wire(event: Event) -> bytes:
    """*event* as a frame, made once for all who get it."""
    if event.wire is None:
        event.wire = _text_frame(event.frame)
    return event.wire


_in = msgspec.json.Decoder(InFrame).decode


class WebSockets:
    """The WebSocket door."""

    def __init__(
        self,
        config: Config,
        *,
        intake: Intake,
        turns: Turns,
        elsewhere: Elsewhere,
        outbox: Outbox,
        backend: Backend,
        access: Access,
        metrics: Metrics,
        wire: Wire,
    ) -> None:
        self._config = config
        self._intake = intake
        self._turns = turns
        self._elsewhere = elsewhere
        self._outbox = outbox
        self._backend = backend
        self._access = access
        self._metrics = metrics
        self._wire = wire
        self._sessions: set[_Session] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._soft = soft_bound(config.max_buffer_bytes)
        self._slow: set[_Session] = set()
        self._looking: asyncio.Task[None] | None = None
        metrics.watch_gauge("hotdesk_websockets", "Open WebSocket connections", lambda: len(self._sessions))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self._access.check_origin(request)
        check_url(request)
        name = request.query.get("conversation")
        if name is None:
            raise DoorError("bad_parameter", "conversation is missing", "GET /v1/ws?conversation=C")
        conversation = conversation_of(name)
        visitor = self._access.visitor(request, conversation)
        after = integer(request.query, "after", None, 0, MAX_SEQ)
        if not self._intake.ready:
            raise DoorError("stopping", "the host is not ready to take messages", retry_after_s=1)
        ws = _Socket(compress=False, max_msg_size=self._config.max_body_bytes, autoping=False, decode_text=False)
        if not ws.can_prepare(request).ok:
            raise DoorError("bad_parameter", "this path is a WebSocket; send an Upgrade request")
        await ws.prepare(request)
        session = ws.session = _Session(self, ws, request, conversation, visitor)
        self._sessions.add(session)
        if self._keeping is None:
            self._keeping = host_task(self._keep_alive())
        leave = self._outbox.join(Reader(conversation, after, messages=False, sink=session, backend=self._backend))
        try:
            await session.run()
        finally:
            leave()
            self._sessions.discard(session)
            self._slow.discard(session)
            ws.session = None
            if self._config.on_leave == "cancel":
                self._elsewhere.leave(conversation)
        return ws

    async def send_off(self, but: Callable[[str], bool]) -> None:
        """Close the connections with 1012, but for those of conversations that *but* is true of: another worker serves.

        They come back to that one at once, and do not wait for turns of others.
        """
        gone = [session for session in self._sessions if not but(session.conversation)]
        await asyncio.gather(*(s.aclose(WSCloseCode.SERVICE_RESTART, b"come back") for s in gone))

    async def aclose(self) -> None:
        """Close every connection with 1012, "service restart": come back."""
        for task in (self._keeping, self._looking):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(s.aclose(WSCloseCode.SERVICE_RESTART, b"come back") for s in list(self._sessions)))

    async def _keep_alive(self) -> None:
        """Ping everyone in turn, and drop whoever was not heard of since the last time."""
        steps = round(PING_S / PING_STEP_S)
        while True:
            order = list(self._sessions)
            for step in range(steps):
                await asyncio.sleep(PING_STEP_S)
                for session in order[step::steps]:
                    session.ping()

    def watch(self, session: _Session) -> None:
        """Look after *session* until it has taken what it was sent."""
        self._slow.add(session)
        if self._looking is None:
            self._looking = host_task(self._look())

    async def _look(self) -> None:
        while self._slow:
            await asyncio.sleep(max(LOOK_S, len(self._slow) * LOOK_EACH_S))
            now = time.monotonic()
            for session in list(self._slow):
                if session.catch_up(now):
                    self._slow.discard(session)
        self._looking = None


class _Socket(web.WebSocketResponse[Literal[False]]):
    """aiohttp closes for whoever breaks the protocol; here an error frame says so first."""

    session: _Session | None = None

    async def close(self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        if code in BROKEN and self.session is not None:
            self.session.refuse(DoorError(*BROKEN[WSCloseCode(code)]), None)
        return await super().close(code=code, message=message, drain=drain)


class _Session:
    """One visitor's connection: a sink for its reader."""

    __slots__ = (
        "__weakref__",
        "_closing",
        "_door",
        "_full",
        "_heard",
        "_held",
        "_remote",
        "_taken_at",
        "_transport",
        "_unaccepted",
        "_unsent",
        "_visitor",
        "conversation",
        "ws",
    )

    def __init__(
        self,
        door: WebSockets,
        ws: _Socket,
        request: web.Request,
        conversation: str,
        visitor: Visitor | None,
    ) -> None:
        self._door = door
        self.ws = ws
        self._transport: Any = request.transport
        self._remote = request.remote or ""
        self.conversation = conversation
        self._visitor = visitor
        self._closing = False
        self._heard = True
        self._full = False
        self._held: Held | None = None
        self._unsent = 0
        self._taken_at = 0.0
        self._unaccepted: dict[str, bool] | None = None
        """Messages that are not on disk yet, and whether they are to be cancelled as soon as they are."""

    def send(self, event: Event) -> bool:
        if self._held is not None and self._held.overtaken_by(event):
            self._held = None
        self._write_frames(_wire(event))
        return self._full

    def send_chunks(self, events: list[Event]) -> bool:
        if self._closing or self._transport.is_closing():
            return True  # who comes after this one is told when it has left
        if self._full:
            self._hold(events)
            return True
        if self.ws.closed:
            return True
        # what was unsent before is below the soft bound, or it were full
        self._transport.write(_wire(events[0]) if len(events) == 1 else b"".join(map(_wire, events)))
        unsent = self._transport.get_write_buffer_size()
        if unsent > self._door._soft:
            self._full, self._unsent, self._taken_at = True, unsent, time.monotonic()
            self._door.watch(self)
        return self._full

    def _hold(self, events: list[Event]) -> None:
        """Keep chunks back until the visitor has taken what it was sent; one that is too far behind is closed."""
        held = self._held
        for event in events:
            if held is not None and held.to == event.to:
                held.add(event.data)
                continue
            if held is not None:
                self._write_frames(_wire(held.event()))
            held = self._held = Held(event.data)
        assert held is not None
        if held.size + self._transport.get_write_buffer_size() > self._door._config.max_buffer_bytes:
            self._fall_behind()

    def catch_up(self, now: float) -> bool:
        """Look how far the visitor is, and give it what was held back; true when it need not be looked after."""
        unsent = self._transport.get_write_buffer_size()
        if self._closing or self._transport.is_closing():
            self._held = None
            return True
        if unsent < self._unsent:
            self._taken_at = now
        self._unsent = unsent
        if unsent > self._door._soft // 2:
            if now - self._taken_at > self._door._config.reader_stall_s:
                self._fall_behind()
            return False
        self._full = False
        if self._held is not None:
            event, self._held = self._held.event(), None
            self.send_chunks([event])
        if self._full:
            return False
        self._door._turns.make_room(self.conversation)
        return True

    def _write(self, data: bytes) -> None:
        self._write_frames(_text_frame(data))

    def _write_frames(self, data: bytes) -> None:
        """Hand *data* to the socket without waiting; a reader that is too far behind is closed, resumably.

        aiohttp's own send waits for the reader, and can't be left waiting, so whole frames go to the transport here.

        Too far is judged by what was sent before: one reply over the bound alone still reaches whoever reads.
        """
        if self._closing or self.ws.closed:
            return
        if self._transport.get_write_buffer_size() > self._door._config.max_buffer_bytes:
            self._fall_behind()
            return
        if self._transport.is_closing():
            self._closing = True
            return
        self._transport.write(data)

    def _fall_behind(self) -> None:
        self._closing = True
        self._held = None
        self._door._metrics.slow_readers.labels("websocket").inc()
        if self._transport.is_closing():
            self._transport.abort()
        else:
            host_task(self.aclose(COME_BACK, b"come back with after="))

    async def aclose(self, code: WSCloseCode, message: bytes) -> None:
        """Close with *code*; the connection is cut if the visitor does not take it."""
        self._closing = True
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.ws.close(code=code, message=message)
        except (TimeoutError, ConnectionError):
            self._transport.abort()

    async def drain(self) -> None:
        half = self._door._config.max_buffer_bytes // 2
        wait_s, until = 0.005, time.monotonic() + self._door._config.reader_stall_s
        while not self._closing and self._transport.get_write_buffer_size() > half:
            if time.monotonic() > until:
                self._fall_behind()
            await asyncio.sleep(wait_s)
            wait_s = min(0.5, wait_s * 1.5)

    def ping(self) -> None:
        if self._closing or self._transport.is_closing():
            return
        if not self._heard:
            self._transport.abort()
            return
        self._heard = False
        self._transport.write(b"\x89\x00")

    async def run(self) -> None:
        while True:
            message = await self.ws.receive()
            self._heard = True
            kind = message.type
            if kind is WSMsgType.TEXT:
                try:
                    self._take(message.data)
                except Exception as exc:  # the wall of a door; the connection goes on
                    self.refuse(self._door._wire.as_door_error(exc, "websocket"), None)
            elif kind is WSMsgType.BINARY:
                self.refuse(DoorError("bad_json", BINARY), None)
            elif kind is WSMsgType.PING:
                await self.ws.pong(message.data)
            elif kind is not WSMsgType.PONG:
                return

    def _take(self, data: bytes) -> None:
        frame = decode(_in, data)
        if frame.type == "ping":
            self._write(PONG)
            return
        if frame.type == "cancel":
            self._cancel(frame.to)
            return
        if frame.type != "message":
            raise DoorError("bad_message", f"type is {frame.type!r}; it may be message, cancel or ping - at `$.type`")
        try:
            new = to_message(frame, self.conversation, self._door._config.max_text_bytes)
            if self._visitor is not None:
                self._door._access.check_expiry(self._visitor)
                new = NewMessage(
                    new.conversation, new.text, new.id, type(new.sender)(self._visitor.id, new.sender.name),
                    new.attachments, new.metadata, new.locale,
                )  # fmt: skip
            self._door._access.check_rate(new.sender.id or self._remote)
            self._door._intake.accept_nowait(
                new, partial(self._accepted, frame.id), door="websocket", spooled=self._spooled
            )
            if frame.id is not None:
                if self._unaccepted is None:
                    self._unaccepted = {}
                self._unaccepted[frame.id] = False
        except DoorError as exc:
            self.refuse(exc, frame.id)

    def _cancel(self, message: str | None) -> None:
        if message is None:
            raise DoorError("bad_message", "cancel names a message - at `$.to`")
        try:
            if self._visitor is not None:
                self._door._access.check_expiry(self._visitor)
            if self._door._turns.cancel(self.conversation, message):
                return
            if self._unaccepted is not None and message in self._unaccepted:
                self._unaccepted[message] = True
            elif self._door._backend.owns(self.conversation):
                raise _nothing_to_cancel()
            else:
                host_task(self._cancel_elsewhere(message))
        except DoorError as exc:
            self.refuse(exc, message)

    async def _cancel_elsewhere(self, message: str) -> None:
        try:
            if not await self._door._elsewhere.cancel(self.conversation, message):
                raise _nothing_to_cancel()
        except (DoorError, BackendUnavailable) as exc:
            self.refuse(self._door._wire.as_door_error(exc, "websocket"), message)

    def _accepted(self, given: str | None, outcome: Accepted | BaseException) -> None:
        id = outcome.id if isinstance(outcome, Accepted) else given
        cancelled = id is not None and self._unaccepted is not None and self._unaccepted.pop(id, False)
        self._tell_accepted(given, outcome)
        if not isinstance(outcome, Accepted):
            return
        if cancelled:
            self._cancel(outcome.id)
        if self._door._config.on_leave == "cancel" and self not in self._door._sessions:
            self._door._elsewhere.leave(self.conversation, outcome.id)  # it left before its message was on disk

    def _spooled(self, outcome: Spooled) -> bool:
        self._write(_encode({"type": "spooled", "id": outcome.id}))
        if self._unaccepted is None:
            self._unaccepted = {}
        self._unaccepted.setdefault(outcome.id, False)
        return True

    def _tell_accepted(self, given: str | None, outcome: Accepted | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self.refuse(self._door._wire.as_door_error(outcome, "websocket"), given)
            return
        self._write(_encode({"type": "accepted", "id": outcome.id, "seq": outcome.seq}))
        if outcome.duplicate and outcome.turn is None:
            host_task(self._repeat(outcome))

    async def _repeat(self, accepted: Accepted) -> None:
        """A message that was answered before: its answer again."""
        for wait_s in (*REPEAT_S, None):
            try:
                past = await self._door._backend.outcome(accepted.conversation, accepted.seq, accepted.id)
                break
            except BackendUnavailable as exc:
                if wait_s is None:
                    self.refuse(self._door._wire.as_door_error(exc, "websocket"), accepted.id)
                    return
                await asyncio.sleep(wait_s)
        for reply in past.replies:
            self._write(Event.of(reply).frame)

    def refuse(self, exc: DoorError, to: str | None) -> None:
        self._door._metrics.errors.labels(exc.code).inc()
        self._write(Event.error(to, exc.code, exc.message).frame)
