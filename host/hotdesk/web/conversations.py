"""`/v1/conversations/{c}/…`: messages in, the record, and its events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ..backend import Backend
from ..chat.elsewhere import Elsewhere
from ..chat.intake import Accepted, Intake, NewMessage
from ..chat.outbox import Event, Outbox, Reader
from ..chat.spool import Spooled
from ..chat.turn import Ended
from ..chat.turns import Turns
from ..config import Config
from ..errors import BackendUnavailable, DoorError, MessageLost
from ..metrics import Metrics
from ..runtime.guards import host_task
from .access import Access
from .pace import HangUps, Held, soft_bound
from .wire import SSE_HEADERS, check_url, conversation_of, decode_message, integer, json_response, seconds, sse

__all__ = ["Conversations"]

MAX_WAIT_S = 300.0
MAX_SEQ = 2**63 - 1
LOOK_AGAIN_S = 0.2
HEARTBEAT_S = 15.0
"""A comment line this often keeps proxies from closing a quiet event stream."""


class Conversations:
    """The HTTP doors of conversations."""

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
    ) -> None:
        self._config = config
        self._intake = intake
        self._turns = turns
        self._elsewhere = elsewhere
        self._hang_ups = HangUps() if config.on_leave == "cancel" else None
        self._outbox = outbox
        self._backend = backend
        self._access = access
        self._metrics = metrics
        self._streams = metrics.connections.labels("sse")
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._waiting: set[Callable[[], None]] = set()

    def stop(self) -> None:
        """End the event streams and the waits: who listens comes back elsewhere, or later."""
        self._stopping.set()
        for time_is_up in tuple(self._waiting):
            time_is_up()

    def _enter(self, request: web.Request) -> tuple[str, str]:
        """The conversation, and on whose account the request goes. Raises `DoorError`."""
        self._access.check_origin(request)
        check_url(request)
        conversation = conversation_of(request.match_info["c"])
        visitor = self._access.visitor(request, conversation)
        return conversation, visitor.id if visitor else ""

    async def post(self, request: web.Request) -> web.StreamResponse:
        conversation, visitor = self._enter(request)
        content_type = request.headers.get("Content-Type")
        if content_type is not None and content_type.partition(";")[0].strip().lower() != "application/json":
            raise DoorError(
                "unsupported_media_type", f"the body is {content_type[:100]}", "send Content-Type: application/json"
            )
        wait = seconds(request.query, "wait", MAX_WAIT_S)
        new = decode_message(await request.read(), conversation, self._config.max_text_bytes)
        if visitor:
            new = NewMessage(
                new.conversation, new.text, new.id, type(new.sender)(visitor, new.sender.name), new.attachments,
                new.metadata, new.locale,
            )  # fmt: skip
        if self._config.rate_per_minute:
            self._access.check_rate(new.sender.id or request.remote or "")
        if "text/event-stream" in request.headers.get("Accept", ""):
            return await self._post_stream(request, new)
        accepted, ended = await self._say(new, wait, request.transport)
        if isinstance(accepted, Spooled):
            return json_response(_spooled(accepted), 202)
        body: dict[str, Any] = {
            "id": accepted.id, "conversation": accepted.conversation, "seq": accepted.seq, "status": "accepted",
        }  # fmt: skip
        if ended is None:
            return json_response(body, 202)
        body["replies"] = ended.replies
        if ended.error is not None:
            body["error"] = {"code": ended.error[0], "message": ended.error[1]}
        return json_response(body)

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        conversation, _ = self._enter(request)
        message = request.match_info["id"]
        if not await self._elsewhere.cancel(conversation, message):
            raise DoorError("not_found", "no turn of that message is under way", "what it came to is in the record")
        return json_response({"id": message, "status": "cancelling"}, 202)

    async def _say(
        self, new: NewMessage, wait: float | None, transport: asyncio.Transport | None
    ) -> tuple[Accepted | Spooled, Ended | None]:
        """Have *new* accepted, and wait for its turn's end; None for that when the time is up first, or it is spooled.

        One future for both: this is the path of every `?wait`, and each wake-up costs it.
        """
        if wait is None:
            return await self._intake.accept(new, door="http"), None
        loop = self._loop
        future: asyncio.Future[Ended | None] = loop.create_future()
        known: list[Accepted] = []
        kept: list[Spooled] = []
        late = gone = False

        def told(outcome: Accepted | BaseException) -> None:
            if future.done():
                return
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
                return
            known.append(outcome)
            if outcome.turn is not None:
                outcome.turn.waiting += 1
            if late or outcome.turn is None:
                future.set_result(None)
            else:
                outcome.turn.tell_end(future)

        def spooled(outcome: Spooled) -> bool:
            kept.append(outcome)
            if not future.done():
                future.set_result(None)
            return False

        def time_is_up() -> None:
            nonlocal late
            late = True
            if known and not future.done():
                future.set_result(None)

        def hung_up() -> None:
            nonlocal gone
            gone = True
            time_is_up()

        self._intake.accept_nowait(new, told, door="http", spooled=spooled)
        handle = loop.call_later(wait, time_is_up)
        self._waiting.add(time_is_up)
        forget = self._hang_ups.watch(transport, hung_up) if self._hang_ups is not None else None
        try:
            ended = await future
        finally:
            handle.cancel()
            self._waiting.discard(time_is_up)
            if forget is not None:
                forget()
            if known and (turn := known[0].turn) is not None:
                turn.waiting -= 1
                if gone:
                    self._elsewhere.leave(new.conversation, turn.id)
        if kept:
            return kept[0], None
        accepted = known[0]
        if accepted.turn is None:
            outcome = await self._backend.outcome(accepted.conversation, accepted.seq, accepted.id)
            return accepted, Ended(outcome.replies) if outcome.ended else None
        return accepted, ended

    async def _post_stream(self, request: web.Request, new: NewMessage) -> web.StreamResponse:
        sink = self._sink(new.conversation, at_stop=STOPPING)
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        known: list[Accepted] = []
        gone = False

        def tell(outcome: Accepted | BaseException) -> None:
            was_spooled = taken.done()
            if taken.cancelled():
                return
            if isinstance(outcome, BaseException):
                taken.set_exception(outcome)
                return
            if gone:
                if self._hang_ups is not None:
                    self._elsewhere.leave(new.conversation, outcome.id)
                return
            known.append(outcome)
            first = {"id": outcome.id, "conversation": outcome.conversation, "seq": outcome.seq, "status": "accepted"}
            sink.send(Event("accepted", first))
            if (turn := outcome.turn) is not None:
                turn.watch(sink.send)
                turn.wait_ended().add_done_callback(
                    lambda ended: sink.end(STOPPING if ended.cancelled() else Event("done", {"id": outcome.id}))
                )
            if not was_spooled:
                taken.set_result(None)
            elif outcome.turn is None:
                host_task(self._tell_late_past(outcome, sink))

        def spooled(outcome: Spooled) -> bool:
            if taken.done():
                return False
            sink.send(Event("spooled", _spooled(outcome)))
            taken.set_result(None)
            return True

        self._intake.accept_nowait(new, tell, door="sse", spooled=spooled)
        await taken
        if known and known[0].turn is None:
            await self._tell_past(known[0], sink)
        try:
            return await self._stream(request, sink)
        finally:
            gone = True
            turn = known[0].turn if known else None
            if turn is not None and turn.watchers and sink.send in turn.watchers:
                turn.watchers.remove(sink.send)
                self._turns.make_room(new.conversation)
                if self._hang_ups is not None:
                    self._elsewhere.leave(new.conversation, turn.id)

    async def _tell_past(self, accepted: Accepted, sink: _SseSink) -> None:
        """The answer of a message that was answered before. Raises `BackendUnavailable`."""
        past = await self._backend.outcome(accepted.conversation, accepted.seq, accepted.id)
        if not past.ended:  # it had, a moment ago, on a server that another has replaced
            raise MessageLost("journal", "the answer to this message was lost; send the message again")
        for reply in past.replies:
            sink.send(Event.of(reply))
        sink.end(Event("done", {"id": accepted.id}))

    async def _tell_late_past(self, accepted: Accepted, sink: _SseSink) -> None:
        """As `_tell_past`, in a stream that has begun: a journal that is back may take writes before it answers."""
        while not sink.ended:
            try:
                await self._tell_past(accepted, sink)
            except BackendUnavailable:
                await asyncio.sleep(LOOK_AGAIN_S)

    def _sink(self, conversation: str, *, at_stop: Event | None = None) -> _SseSink:
        return _SseSink(self._config, lambda: self._turns.make_room(conversation), at_stop)

    async def _stream(self, request: web.Request, sink: _SseSink) -> web.StreamResponse:
        """Write what *sink* is sent until it ends, the host stops, or the reader is gone or too slow."""
        response = web.StreamResponse(headers=SSE_HEADERS)
        self._streams.inc()
        forget = self._hang_ups.watch(request.transport, sink.hang_up) if self._hang_ups is not None else None
        try:
            await response.prepare(request)
            await sink.run(request, response, self._stopping)
            await response.write_eof()
        except (ConnectionError, TimeoutError):
            pass  # the reader left or stalled: what it missed is in the record
        finally:
            self._streams.dec()
            if forget is not None:
                forget()
            if sink.stalled:
                self._metrics.slow_readers.labels("sse").inc()
        return response

    async def record(self, request: web.Request) -> web.StreamResponse:
        conversation, _ = self._enter(request)
        after = integer(request.query, "after", 0, 0, MAX_SEQ)
        limit = integer(request.query, "limit", 100, 1, 1000)
        entries = await self._backend.read(conversation, after, limit + 1)
        if entries is None:
            raise DoorError("conversation_not_found", "nothing was ever said in this conversation")
        more = len(entries) > limit
        shown = entries[:limit]
        return json_response({"messages": shown, "next": shown[-1].seq if more else None})

    async def events(self, request: web.Request) -> web.StreamResponse:
        conversation, _ = self._enter(request)
        last = request.headers.get("Last-Event-ID")
        query = {"after": last} if last is not None else request.query
        after = integer(query, "after", None, 0, MAX_SEQ)
        sink = self._sink(conversation)
        leave = self._outbox.join(Reader(conversation, after, messages=True, sink=sink, backend=self._backend))
        try:
            return await self._stream(request, sink)
        finally:
            leave()
            if self._hang_ups is not None:
                self._elsewhere.leave(conversation)


STOPPING = Event.error(None, "stopping", "the host is stopping; the message is kept, and answered after its next start")


def _spooled(outcome: Spooled) -> dict[str, Any]:
    """What is said of a message that is on this machine's disk: no seq before it has one."""
    return {"id": outcome.id, "conversation": outcome.conversation, "seq": None, "status": "spooled"}


class _SseSink:
    """Writes events to one response; over its bound it cuts the connection, whose reader resumes by its last id.

    Too far is judged by what was sent before: one event over the bound alone still reaches whoever reads. Chunks
    beyond the soft bound are held, and go out as one.
    """

    def __init__(self, config: Config, on_room: Callable[[], None], at_stop: Event | None) -> None:
        self._limit = config.max_buffer_bytes
        self._soft = soft_bound(config.max_buffer_bytes)
        self._stall_s = config.reader_stall_s
        self._on_room = on_room
        self._at_stop = at_stop
        self._queue: list[bytes] = []
        self._size = 0
        self._held: Held | None = None
        self._full = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._transport: asyncio.Transport | None = None
        self._ended = False
        self.stalled = False

    def send_chunks(self, events: list[Event]) -> bool:
        full = False
        for event in events:
            full = self.send(event)
        return full

    def send(self, event: Event) -> bool:
        if self._ended:
            return True
        if self._size + (self._held.size if self._held is not None else 0) > self._limit:
            self._cut()
            return True
        if event.kind == "chunk" and (self._held is not None or self._size > self._soft):
            self._hold(event)
            return True
        if self._held is not None and self._held.overtaken_by(event):
            self._held = None
        self._put(sse(event.kind, event.frame, event.seq))
        if self._size > self._soft:
            self._full = True
        return self._full

    def _put(self, data: bytes) -> None:
        self._queue.append(data)
        self._size += len(data)
        self._wake.set()
        if self._size > self._limit // 2:
            self._room.clear()

    def _hold(self, event: Event) -> None:
        self._full = True
        if self._held is not None and self._held.to == event.to:
            self._held.add(event.data)
            return
        self._release()
        self._held = Held(event.data)

    def _release(self) -> None:
        """What is held takes its place in the queue."""
        if self._held is not None:
            held, self._held = self._held.event(), None
            self._put(sse(held.kind, held.frame))

    def _cut(self) -> None:
        self.stalled = True
        self.hang_up()
        if self._transport is not None:
            self._transport.abort()

    @property
    def ended(self) -> bool:
        """What is sent now is sent to nobody."""
        return self._ended

    def hang_up(self) -> None:
        """There is nobody to send to any more."""
        self._ended = True
        self._queue.clear()
        self._held = None
        self._room.set()
        self._wake.set()

    def end(self, event: Event) -> None:
        """Send *event* as the last one. It cuts nobody off: a reply over the bound may have been sent just before."""
        if not self._ended:
            self._release()
            self._put(sse(event.kind, event.frame, event.seq))
        self._ended = True
        self._wake.set()

    async def drain(self) -> None:
        await self._room.wait()

    async def run(self, request: web.Request, response: web.StreamResponse, stopping: asyncio.Event) -> None:
        self._transport = request.transport
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while True:
                while self._queue:
                    data = b"".join(self._queue)
                    self._queue.clear()
                    self._size = 0
                    self._room.set()
                    await self._write(response, data)
                    self._release()
                    if self._full:
                        self._full = False
                        self._on_room()
                if self._ended:
                    return
                if stop.done():
                    if self._at_stop is None:
                        return
                    self.end(self._at_stop)
                    continue
                self._wake.clear()
                woken = asyncio.ensure_future(self._wake.wait())
                done, _ = await asyncio.wait({stop, woken}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
                if not done:
                    await self._write(response, b": still here\n\n")
        finally:
            stop.cancel()

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await response.write(data)
        except TimeoutError:
            self._cut()
            raise
