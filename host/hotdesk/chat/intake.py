"""Taking messages in: bounded, once per id, on disk before anyone is told."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from hotdesk_sdk import Attachment, Message, Sender

from ..backend import Appended, Backend, StoredReply
from ..errors import BackendUnavailable, DoorError
from ..metrics import Metrics
from ..runtime.guards import host_task
from .background import Background
from .elsewhere import Elsewhere
from .images import Images, Uploads
from .outbox import Event, Outbox
from .recent import Recent
from .spool import Spool, Spooled
from .turn import TurnRun
from .turns import Turns, new_id

__all__ = ["Accepted", "Intake", "NewMessage"]


class NewMessage(msgspec.Struct, frozen=True):
    """A message as a door read it, not yet accepted."""

    conversation: str
    text: str
    id: str | None = None
    sender: Sender = Sender()
    attachments: tuple[Attachment, ...] = ()
    metadata: dict[str, Any] = {}
    locale: str | None = None


class Accepted(msgspec.Struct, frozen=True):
    """A message that is on disk. `turn` is the turn that answers it; None when that has ended (a repeat)."""

    id: str
    conversation: str
    seq: int
    duplicate: bool
    turn: TurnRun | None


Told = Callable[[Accepted | BaseException], None]
OnSpooled = Callable[[Spooled], bool]


class _Held:
    """A message that waits for its images to be kept, or behind one that does. `task` is None once it is ready."""

    __slots__ = ("attachments", "channel", "door", "new", "problem", "spooled", "task", "told")

    def __init__(self, new: NewMessage, told: Told, door: str, channel: str, spooled: OnSpooled | None) -> None:
        self.new = new
        self.told = told
        self.spooled = spooled
        self.door = door
        self.channel = channel
        self.attachments: tuple[Attachment, ...] = ()
        self.problem: Exception | None = None
        self.task: asyncio.Task[None] | None = None


class Intake:
    """The one way in. Messages of one conversation are numbered in the order of the calls."""

    def __init__(
        self,
        *,
        backend: Backend,
        images: Images,
        turns: Turns,
        elsewhere: Elsewhere,
        recent: Recent,
        outbox: Outbox,
        background: Background,
        metrics: Metrics,
        max_turns: int,
        spool: Spool | None = None,
    ) -> None:
        self._backend = backend
        self._images = images
        self._turns = turns
        self._elsewhere = elsewhere
        self._recent = recent
        self._outbox = outbox
        self._background = background
        self._metrics = metrics
        self._max_turns = max_turns
        self._spool = spool
        if spool is not None:
            spool.begin = self._begin_spooled
            spool.count_room = self._count_room
        self._loop = asyncio.get_running_loop()
        self._appending = 0
        self._ready = False
        self._stopping = False
        self._doors: dict[str, Any] = {}
        self._held: dict[str, deque[_Held]] = {}

    def open(self) -> None:
        """From now on messages are taken."""
        self._ready = True

    def stop(self) -> None:
        """From now on they are refused with `stopping`, those too whose images are still being checked."""
        self._stopping = True
        if self._spool is not None:
            self._spool.stop()
        for lane in self._held.values():
            for held in lane:
                self._appending -= 1
                if held.task is not None:
                    held.task.cancel()
                self._loop.call_soon(held.told, DoorError("stopping", "the host is stopping", retry_after_s=1))
        self._held.clear()

    @property
    def ready(self) -> bool:
        return self._ready and not self._stopping

    def accept(self, new: NewMessage, *, door: str, channel: str = "") -> asyncio.Future[Accepted | Spooled]:
        """Keep *new* and begin its turn. Raises `DoorError` at once when it can't be taken; so may the future."""
        accepted: asyncio.Future[Accepted | Spooled] = self._loop.create_future()

        def told(outcome: Accepted | BaseException) -> None:
            if accepted.done():
                return
            if isinstance(outcome, Accepted):
                accepted.set_result(outcome)
            else:
                accepted.set_exception(outcome)

        def spooled(outcome: Spooled) -> bool:
            if not accepted.done():
                accepted.set_result(outcome)
            return False

        self.accept_nowait(new, told, door=door, channel=channel, spooled=spooled)
        return accepted

    def accept_nowait(
        self, new: NewMessage, told: Told, *, door: str, channel: str = "", spooled: OnSpooled | None = None
    ) -> None:
        """Like `accept`, with a callback: it is called before the turn's first step, so before any chunk.

        While the journal is away and there is a spool, *spooled* is called once the message is on this machine's disk;
        it says whether *told* is still to be called, when the message is in the journal.
        """
        if not self.ready:
            raise DoorError("stopping", "the host is not ready to take messages", retry_after_s=1)
        if self._turns.live + self._elsewhere.live + self._appending >= self._max_turns:
            raise DoorError("overloaded", f"{self._max_turns} turns are under way", retry_after_s=1)
        if new.attachments or (self._held and new.conversation in self._held):
            self._hold(_Held(new, told, door, channel, spooled))
        else:
            self._append(new, (), told, door, channel, spooled)

    def _hold(self, held: _Held) -> None:
        """Append a message once its images are kept and those before it in its conversation are appended.

        Others of its conversation wait behind it, for they came later; no other conversation does.
        """
        conversation = held.new.conversation
        attachments: tuple[Attachment, ...] | Uploads = ()
        if held.new.attachments:
            attachments = self._images.check_nowait(conversation, held.new.attachments)
        lane = self._held.get(conversation)
        if isinstance(attachments, tuple):
            if lane is None:
                self._append(held.new, attachments, held.told, held.door, held.channel, held.spooled)
                return
            held.attachments = attachments
        if lane is None:
            lane = self._held[conversation] = deque()
        lane.append(held)
        self._appending += 1
        if isinstance(attachments, Uploads):
            held.task = host_task(self._keep(held, attachments))

    async def _keep(self, held: _Held, uploads: Uploads) -> None:
        try:
            held.attachments = await self._images.keep(uploads)
        except Exception as exc:  # whatever it is, the door tells it, and the messages behind go on
            held.problem = exc
        held.task = None
        lane = self._held.get(held.new.conversation)
        while lane and lane[0].task is None:
            self._let_go(lane.popleft())
        if lane is not None and not lane:
            del self._held[held.new.conversation]

    def _let_go(self, held: _Held) -> None:
        self._appending -= 1
        problem = held.problem
        if problem is None:
            try:
                self._append(held.new, held.attachments, held.told, held.door, held.channel, held.spooled)
            except Exception as exc:  # what the caller of `accept_nowait` would have got
                problem = exc
        if problem is not None:
            self._loop.call_soon(held.told, _refusal(problem))

    def _append(
        self,
        new: NewMessage,
        attachments: tuple[Attachment, ...],
        told: Told,
        door: str,
        channel: str,
        spooled: OnSpooled | None,
    ) -> None:
        message = Message(
            new.id or new_id("m"), new.conversation, 0, new.text, new.sender, attachments, new.metadata, time.time()
        )
        if self._spool is not None:
            self._append_by(self._spool, message, new.locale, told, door, channel, spooled)
            return

        def appended(future: asyncio.Future[Appended]) -> None:
            self._appending -= 1
            exc = future.exception() if not future.cancelled() else DoorError("stopping", "the host is stopping")
            if exc is not None:
                told(_refusal(exc))
                return
            self._count(door)
            told(self._begin(message, future.result()))

        appending = self._backend.append(
            message, channel=channel, locale=new.locale, given=new.id is not None, chunks=door == "sse"
        )
        self._appending += 1
        appending.add_done_callback(appended)

    def _append_by(
        self,
        spool: Spool,
        message: Message,
        locale: str | None,
        told: Told,
        door: str,
        channel: str,
        spooled: OnSpooled | None,
    ) -> None:
        """As `_append`, with a spool for when the journal is away."""
        under_way = True

        def settle() -> None:
            nonlocal under_way
            if under_way:
                under_way = False
                self._appending -= 1

        def appended(outcome: Appended | BaseException) -> None:
            settle()
            if isinstance(outcome, BaseException):
                told(_refusal(outcome))
            else:
                self._count(door)
                told(self._begin(message, outcome))

        def kept(outcome: Spooled) -> bool:
            settle()
            return spooled is None or spooled(outcome)

        spool.take(message, channel=channel, locale=locale, door=door, told=appended, spooled=kept)
        self._appending += 1

    def _begin_spooled(self, message: Message, appended: Appended, door: str) -> None:
        self._count(door)
        self._begin(message, appended)

    def _count_room(self) -> int:
        """How many turns of spooled messages may begin: half of all is for those that come in now."""
        live = self._turns.live + self._elsewhere.live + self._appending
        return max(self._max_turns // 2 - live, 0 if live else 1)

    def _count(self, door: str) -> None:
        counter = self._doors.get(door)
        if counter is None:
            counter = self._doors[door] = self._metrics.messages.labels(door)
        counter.inc()

    def _begin(self, message: Message, appended: Appended) -> Accepted:
        if appended.duplicate:
            self._metrics.duplicates.inc()
            turn = self._turns.find(message.conversation, message.id)
            if turn is None and appended.open:
                msgspec.structs.force_setattr(message, "seq", appended.seq)
                turn = self._elsewhere.follow_repeat(message)
            return Accepted(message.id, message.conversation, appended.seq, True, turn)
        msgspec.structs.force_setattr(message, "seq", appended.seq)
        if not appended.here:
            turn = self._elsewhere.follow(message)
            return Accepted(message.id, message.conversation, appended.seq, False, turn)
        self._recent.note(message)
        turn = self._elsewhere.begin(message, appended.conversation, fence=appended.fence)
        if self._outbox.listened(message.conversation):
            self._outbox.tell(message.conversation, Event.of(message))
        if appended.opened:
            self._background.observe_conversation("on_conversation_opened", appended.conversation)
        self._background.observe("on_message", message)
        return Accepted(message.id, message.conversation, appended.seq, False, turn)

    async def say(
        self,
        conversation: str,
        text: str,
        *,
        plugin: str,
        generation: int,
        metadata: dict[str, Any] | None,
        channel: str | None = None,
    ) -> StoredReply:
        """A reply outside a turn (`ctx.send`). Raises `LookupError` when nothing was ever said there, and
        `PermissionError` when the conversation is not of the *channel* that is given."""
        reply = StoredReply(new_id("r"), conversation, 0, None, text, plugin, generation, metadata or {}, time.time())
        record = await self._backend.record(conversation)
        if channel is not None and record is not None and record.channel != channel:
            raise PermissionError("send to a conversation of others")
        deliver = record is not None and self._background.delivers(record.channel)
        stored = await self._backend.post(reply, deliver=deliver)
        if stored is None or record is None:
            raise LookupError(f"nothing was ever said in conversation {conversation!r}")
        if not self._backend.owns(conversation):
            return stored  # whoever owns it hears of it, and so does whoever listens
        self._outbox.tell(conversation, Event.of(stored))
        self._recent.note(stored)
        self._background.observe("on_reply", stored)
        if deliver:
            self._background.deliver(stored, record)
        return stored

    async def resume(self) -> int:
        """Run what was accepted and not answered before the last stop. Returns how many that are."""
        return await self._backend.start(self._elsewhere)


def _refusal(exc: BaseException) -> BaseException:
    if isinstance(exc, BackendUnavailable):
        return DoorError("backend_unavailable", exc.told, retry_after_s=1)
    return exc
