"""Turns that other workers run, and what this one is told of them: with one worker there are none.

Who waits here for a turn that runs elsewhere holds a `TurnRun` that is never started: it *follows* the real one, by
its news. When a partition changes hands, turns go from the one kind to the other, and whoever waits notices nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from hotdesk_sdk import Message

from ..backend import Backend, ConversationRecord, Entry, StoredReply
from ..errors import BackendError, MessageLost
from ..logs import Logger
from ..runtime.guards import host_task
from .background import Background
from .outbox import Event, Outbox
from .recent import Recent
from .turn import LOST, Ended, TurnRun
from .turns import Turns

__all__ = ["Elsewhere"]

EARLY = 1024
"""News of ends that came before the word that the message was kept: how many are remembered."""

LOOK_S = 2.0
OVERDUE_S = 5.0
"""A turn that was followed for so long is asked about in the journal, every `LOOK_S`: its news may have been missed."""

LOST_S = 30.0
"""A followed message that the journal has not known for so long is lost. A server that was replaced, and does not know
it yet, knows an older record for some seconds."""

Key = tuple[str, str]


class Elsewhere:
    """See `backend.Listener`; the backend calls it."""

    def __init__(
        self,
        *,
        backend: Backend,
        turns: Turns,
        recent: Recent,
        outbox: Outbox,
        background: Background,
        log: Logger,
    ) -> None:
        self._backend = backend
        self._turns = turns
        self._recent = recent
        self._outbox = outbox
        self._background = background
        self._log = log
        self._followed: dict[Key, TurnRun] = {}
        self._repeats: set[Key] = set()
        self._lost_since: dict[Key, float] = {}
        self._early: OrderedDict[Key, Ended] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()
        self._looking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        outbox.on_listen = backend.follow
        turns.on_stale = self._hand_back

    @property
    def live(self) -> int:
        """Turns that were accepted here, run elsewhere and have not ended."""
        return len(self._followed)

    def _spawn(self, coro: Any) -> None:
        task = host_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- turns that run elsewhere ----------------------------------------------------------------------------

    def follow(self, message: Message) -> TurnRun:
        """A message that was accepted here and is answered elsewhere."""
        key = message.conversation, message.id
        if (turn := self._turns.find(*key)) is not None:
            return turn  # its conversation came to this worker meanwhile
        self._outbox.anchor(message.conversation, message.seq)
        turn = self._add(message)
        if (ended := self._early.pop(key, None)) is not None:
            self._resolve(key, ended)
        return turn

    def follow_repeat(self, message: Message) -> TurnRun:
        """A message that came again, while its turn runs elsewhere."""
        key = message.conversation, message.id
        if (turn := self._followed.get(key)) is not None:
            return turn
        turn = self._add(message)
        self._repeats.add(key)
        self._backend.follow(message.conversation, True)
        self._spawn(self._ask(key))
        return turn

    def _add(self, message: Message) -> TurnRun:
        key = message.conversation, message.id
        turn = TurnRun(message, ConversationRecord(message.conversation), self._recent, 1, time.monotonic())
        if (before := self._followed.get(key)) is not None:
            turn.take_audience(before)  # of a message that the journal lost, and took in anew
            self._lost_since.pop(key, None)
        self._followed[key] = turn
        self._idle.clear()
        if self._looking is None:
            self._looking = host_task(self._look())
        return turn

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            overdue = time.monotonic() - OVERDUE_S
            for key, turn in tuple(self._followed.items()):
                if turn.started < overdue and key in self._followed:
                    await self._ask(key)

    async def _ask(self, key: Key) -> None:
        """Look in the journal whether a followed turn has ended."""
        turn = self._followed.get(key)
        if turn is None:
            return
        try:
            outcome = await self._backend.outcome(key[0], turn.message.seq, key[1])
        except MessageLost as exc:
            if self._followed.get(key) is not turn:
                return
            if time.monotonic() - self._lost_since.setdefault(key, time.monotonic()) > LOST_S:
                self._log.error("message_lost", conversation=key[0], message=key[1], problem=exc.reason)
                self._resolve(key, Ended((), LOST))
            return
        except BackendError:
            return
        self._lost_since.pop(key, None)
        if outcome.ended and self._followed.get(key) is turn:
            if key not in self._repeats:
                self._log.info("turn_end_looked_up", conversation=key[0], message=key[1])
            self._resolve(key, Ended(outcome.replies))

    def _forget(self, key: Key) -> TurnRun | None:
        turn = self._followed.pop(key, None)
        self._lost_since.pop(key, None)
        if key in self._repeats:
            self._repeats.discard(key)
            self._backend.follow(key[0], False)
        if not self._followed:
            self._idle.set()
        return turn

    def _resolve(self, key: Key, ended: Ended) -> None:
        turn = self._forget(key)
        if turn is None:
            return
        for watcher in tuple(turn.watchers or ()):
            for reply in ended.replies:
                self._tell_watcher(turn, watcher, Event.of(reply))
            if ended.error is not None:
                self._tell_watcher(turn, watcher, Event.error(turn.id, *ended.error))
        turn.end(ended)

    def _tell_watcher(self, turn: TurnRun, watcher: Callable[[Event], object], event: Event) -> None:
        try:
            watcher(event)
        except Exception as exc:  # as in the outbox: a door's fault is not the turn's
            self._log.error("watcher_failed", conversation=turn.message.conversation, exc_info=exc)

    def begin(self, message: Message, record: ConversationRecord, *, attempt: int = 1, fence: Any) -> TurnRun:
        """Run a message's turn here. Who waits for it elsewhere waits for this one.

        So does who waits for a turn of it that runs here: the journal lost that message, and took it in anew, so what
        that turn comes to could not be kept.
        """
        key = message.conversation, message.id
        if (before := self._turns.find(*key)) is not None:
            self._hand_back(before)
            before.fence.close()
        waiting = self._forget(key)
        turn = self._turns.begin(message, record, attempt=attempt, fence=fence)
        if waiting is not None:
            turn.take_audience(waiting)
        return turn

    # -- what the backend says: see `backend.Listener` -------------------------------------------------------

    def run(
        self, message: Message, record: ConversationRecord, *, attempt: int, opened: bool, fence: Any, own: bool = False
    ) -> None:
        key = message.conversation, message.id
        before = self._turns.find(*key)
        if before is not None and before.fence.tag == fence.tag:
            return
        followed = key in self._followed
        turn = self.begin(message, record, attempt=attempt, fence=fence)
        turn.remote = not followed and not own
        if own and not followed:
            turn.wait_ended().add_done_callback(lambda ended: self._remember(key, ended))
        if attempt > 1:
            return
        self._recent.note(message)
        if self._outbox.listened(message.conversation):
            self._outbox.tell(message.conversation, Event.of(message))
        if opened:
            self._background.observe_conversation("on_conversation_opened", record)
        self._background.observe("on_message", message)

    def redeliver(self, reply: StoredReply, record: ConversationRecord) -> None:
        self._background.deliver(reply, record)

    def drop(self, belongs: Callable[[str], bool]) -> None:
        self._recent.forget(belongs)
        self._background.forget(belongs)
        for turn in self._turns.drop(belongs):
            self._follow_dropped(turn)

    def _hand_back(self, turn: TurnRun) -> None:
        if self._turns.drop_one(turn.message.conversation, turn.id) is not None:
            self._follow_dropped(turn)

    def _follow_dropped(self, turn: TurnRun) -> None:
        """Who waits for a turn that is another worker's now goes on waiting; where nobody does, nobody need follow."""
        if turn.waiters or turn.watchers or turn.waiting:
            self._add(turn.message).take_audience(turn)

    def hear_entry(self, entry: Entry, *, owned: bool, deliver: bool) -> None:
        self._outbox.tell(entry.conversation, Event.of(entry))
        if not owned:
            return
        self._recent.note(entry)
        self._background.observe("on_reply", entry)
        if deliver and isinstance(entry, StoredReply):
            self._spawn(self._deliver(entry))

    async def _deliver(self, reply: StoredReply) -> None:
        try:
            record = await self._backend.record(reply.conversation)
        except BackendError:
            return  # it is handed out by whoever owns the conversation next
        if record is not None:
            self._background.deliver(reply, record)

    def hear_end(
        self, conversation: str, to: str, replies: tuple[StoredReply, ...], error: tuple[str, str] | None, direct: bool
    ) -> None:
        key = conversation, to
        ended = Ended(replies, error)
        if not direct:
            for reply in replies:
                self._outbox.tell(conversation, Event.of(reply))
            if error is not None:
                self._outbox.tell(conversation, Event.error(to, *error))
        if (turn := self._turns.drop_one(conversation, to)) is not None:
            self._follow_dropped(turn)  # this worker ran it too, and was robbed of it
        if key in self._followed:
            self._resolve(key, ended)
        elif direct:
            self._keep_early(key, ended)

    def _remember(self, key: Key, ended: asyncio.Future[Ended | None]) -> None:
        """A turn that began here by a detour ended, maybe before the word that its message was kept."""
        if not ended.cancelled() and (result := ended.result()) is not None:
            self._keep_early(key, result)

    def _keep_early(self, key: Key, ended: Ended) -> None:
        self._early[key] = ended
        if len(self._early) > EARLY:
            self._early.popitem(last=False)

    def hear_chunks(self, conversation: str, to: str, index: int, texts: list[str], direct: bool) -> None:
        events = [Event.chunk(to, number, text) for number, text in enumerate(texts, index)]
        if not direct:
            self._outbox.tell_chunks(conversation, events)
        turn = self._followed.get((conversation, to))
        if turn is None or direct == ((conversation, to) in self._repeats):
            return
        for watcher in tuple(turn.watchers or ()):
            for event in events:
                self._tell_watcher(turn, watcher, event)

    def hear_signal(self, conversation: str, signal: str, message: str) -> bool:
        if signal == "cancel":
            return self._turns.cancel(conversation, message)
        self._spawn(self._leave_here(conversation, message))
        return True

    def resync(self, conversation: str) -> None:
        self._outbox.resync(conversation)

    def resync_turns(self) -> None:
        async def ask_all() -> None:
            for key in tuple(self._followed):
                await self._ask(key)

        self._spawn(ask_all())
        self._recent.forget(lambda conversation: not self._turns.runs_in(conversation))  # it may be another record now

    # -- what is asked of others -----------------------------------------------------------------------------

    async def cancel(self, conversation: str, message: str) -> bool:
        """Give a turn up wherever it runs; see `Turns.cancel`. Raises `BackendUnavailable`."""
        if self._backend.owns(conversation):
            return self._turns.cancel(conversation, message)
        return await self._backend.signal(conversation, "cancel", message)

    def leave(self, conversation: str, message: str | None = None) -> None:
        """Somebody who listened here has gone; see `Turns.leave`."""
        if self._outbox.listened(conversation):
            return
        if self._backend.owns(conversation):
            if self._backend.alone:
                self._turns.leave(conversation, message)
            else:
                self._spawn(self._leave_here(conversation, message))
            return
        for key, turn in self._followed.items():
            if key[0] == conversation and message in (None, key[1]) and not turn.watchers and not turn.waiting:
                self._spawn(self._signal_leave(*key))

    async def _leave_here(self, conversation: str, message: str | None) -> None:
        try:
            if not await self._backend.listened_elsewhere(conversation):
                self._turns.leave(conversation, message)
        except BackendError:
            pass  # the turn goes on; nobody is harmed

    async def _signal_leave(self, conversation: str, message: str) -> None:
        try:
            await self._backend.signal(conversation, "leave", message)
        except BackendError:
            pass  # the turn goes on; nobody is harmed

    async def wait_idle(self, timeout_s: float) -> None:
        """Wait until what was accepted here has ended wherever it runs, at most *timeout_s*."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._idle.wait()
        except TimeoutError:
            pass

    async def aclose(self) -> None:
        tasks = [*self._tasks, *((self._looking,) if self._looking is not None else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for turn in self._followed.values():
            for waiter in turn.waiters or ():
                waiter.cancel()
        self._followed.clear()
