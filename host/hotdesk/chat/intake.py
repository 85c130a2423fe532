"""Taking messages in: bounded, once per id, on disk before anyone is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from hotdesk_sdk import Attachment, Message, Sender

from ..backend import Appended, Backend, StoredReply
from ..errors import BackendUnavailable, DoorError
from ..metrics import Metrics
from .background import Background
from .outbox import Event, Outbox
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


class Intake:
    """The one way in. Messages of one conversation are numbered in the order of the calls."""

    def __init__(
        self,
        *,
        backend: Backend,
        turns: Turns,
        outbox: Outbox,
        background: Background,
        metrics: Metrics,
        max_turns: int,
    ) -> None:
        self._backend = backend
        self._turns = turns
        self._outbox = outbox
        self._background = background
        self._metrics = metrics
        self._max_turns = max_turns
        self._loop = asyncio.get_running_loop()
        self._appending = 0
        self._ready = False
        self._stopping = False
        self._doors: dict[str, Any] = {}

    def open(self) -> None:
        """From now on messages are taken."""
        self._ready = True

    def stop(self) -> None:
        """From now on they are refused with `stopping`."""
        self._stopping = True

    @property
    def ready(self) -> bool:
        return self._ready and not self._stopping

    def accept(self, new: NewMessage, *, door: str, channel: str = "") -> asyncio.Future[Accepted]:
        """Keep *new* and begin its turn. Raises `DoorError` at once when it can't be taken; so may the future."""
        accepted: asyncio.Future[Accepted] = self._loop.create_future()

        def told(outcome: Accepted | BaseException) -> None:
            if accepted.done():
                return
            if isinstance(outcome, Accepted):
                accepted.set_result(outcome)
            else:
                accepted.set_exception(outcome)

        self.accept_nowait(new, told, door=door, channel=channel)
        return accepted

    def accept_nowait(
        self, new: NewMessage, told: Callable[[Accepted | BaseException], None], *, door: str, channel: str = ""
    ) -> None:
        """Like `accept`, with a callback: it is called before the turn's first step, so before any chunk."""
        if not self.ready:
            raise DoorError("stopping", "the host is not ready to take messages", retry_after_s=1)
        if self._turns.live + self._appending >= self._max_turns:
            raise DoorError("overloaded", f"{self._max_turns} turns are under way", retry_after_s=1)
        message = Message(
            new.id or new_id("m"), new.conversation, 0, new.text, new.sender, new.attachments, new.metadata, time.time()
        )
        counter = self._doors.get(door)
        if counter is None:
            counter = self._doors[door] = self._metrics.messages.labels(door)

        def appended(future: asyncio.Future[Appended]) -> None:
            self._appending -= 1
            exc = future.exception() if not future.cancelled() else DoorError("stopping", "the host is stopping")
            if exc is not None:
                told(_refusal(exc))
                return
            counter.inc()
            told(self._begin(message, future.result()))

        appending = self._backend.append(message, channel=channel, locale=new.locale)
        self._appending += 1
        appending.add_done_callback(appended)

    def _begin(self, message: Message, appended: Appended) -> Accepted:
        if appended.duplicate:
            self._metrics.duplicates.inc()
            turn = self._turns.find(message.conversation, message.id)
            return Accepted(message.id, message.conversation, appended.seq, True, turn)
        msgspec.structs.force_setattr(message, "seq", appended.seq)
        turn = self._turns.begin(message, appended.conversation)
        if self._outbox.listened(message.conversation):
            self._outbox.tell(message.conversation, Event.of(message))
        if appended.opened:
            self._background.observe_conversation("on_conversation_opened", appended.conversation)
        self._background.observe("on_message", message)
        return Accepted(message.id, message.conversation, appended.seq, False, turn)

    async def say(
        self, conversation: str, text: str, *, plugin: str, generation: int, metadata: dict[str, Any] | None
    ) -> StoredReply:
        """A reply outside a turn (`ctx.send`). Raises `LookupError` when nothing was ever said there."""
        reply = StoredReply(new_id("r"), conversation, 0, None, text, plugin, generation, metadata or {}, time.time())
        record = await self._backend.record(conversation)
        deliver = record is not None and self._background.delivers(record.channel)
        stored = await self._backend.post(reply, deliver=deliver)
        if stored is None or record is None:
            raise LookupError(f"nothing was ever said in conversation {conversation!r}")
        self._outbox.tell(conversation, Event.of(stored))
        self._background.observe("on_reply", stored)
        if deliver:
            self._background.deliver(stored, record)
        return stored

    async def resume(self) -> int:
        """Run what was accepted and not answered before the last stop. Returns how many that are."""
        unfinished = await self._backend.unfinished()
        for message, record in unfinished:
            self._turns.begin(message, record, attempt=2)
        for reply, record in await self._backend.undelivered():
            self._background.deliver(reply, record)
        return len(unfinished)


def _refusal(exc: BaseException) -> BaseException:
    if isinstance(exc, BackendUnavailable):
        return DoorError("backend_unavailable", exc.reason, retry_after_s=1)
    return exc
