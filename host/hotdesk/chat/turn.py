"""One message being answered: what plugins see of it, and what the host keeps beside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Protocol

import msgspec

from hotdesk_sdk import LlmError, Message, Reply

from ..backend import ConversationRecord, Entry
from ..errors import CallFailed, TurnAborted
from ..runtime.active import Slot, Snapshot
from ..runtime.call import Clock
from .outbox import Event

__all__ = ["LOST", "ConversationView", "Ended", "TurnRun", "as_text"]

_encode = msgspec.json.Encoder().encode


class ConversationView:
    """See `hotdesk_sdk.Conversation`. Made when a plugin first looks; dropped when the turn is run again."""

    __slots__ = ("_closed", "_record", "_state", "assignee", "handed_over", "id", "locale", "set_by_guests", "tags")

    def __init__(self, record: ConversationRecord) -> None:
        self._record = record
        self._state: dict[str, Any] | None = None
        self._closed = False
        self.handed_over = False
        """A human was asked for."""
        self.set_by_guests = 0
        """How many bytes components have put into the state in this turn."""

        self.id = record.id
        self.locale = record.locale
        self.assignee = record.assignee
        self.tags = list(record.tags)

    @property
    def channel(self) -> str:
        return self._record.channel

    @property
    def state(self) -> dict[str, Any]:
        if self._state is None:
            self._state = msgspec.json.decode(self._record.state, type=dict[str, Any])
        return self._state

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._state = value

    def close(self) -> None:
        self._closed = True

    def hand_over(self, reason: str = "") -> None:
        self.handed_over = True
        if "handoff" not in self.tags:
            self.tags.append("handoff")
        self.state["handoff"] = {"reason": as_text(reason, "the reason of a hand-over"), "at": time.time()}

    @property
    def closed(self) -> bool:
        return self._closed

    def changed(self) -> ConversationRecord | None:
        """The record as it is now, or None when nothing changed.

        Raises `TypeError` or `ValueError` on what could not be kept, or not be read again.
        """
        old = self._record
        for name, value in (("assignee", self.assignee), ("locale", self.locale)):
            if value is not None:
                as_text(value, f"conversation.{name}")
        if self._state is not None and not isinstance(self._state, dict):
            raise TypeError(f"conversation.state is a dict, not {type(self._state).__name__}")
        state = old.state if self._state is None else _encode(self._state)
        tags = tuple(map(str, self.tags))
        if (
            not self._closed
            and state == old.state
            and tags == old.tags
            and self.assignee == old.assignee
            and self.locale == old.locale
        ):
            return None
        return ConversationRecord(old.id, old.channel, self.locale, self.assignee, tags, state)


def as_text(value: Any, what: str) -> str:
    """*value* as it is, if it is text that UTF-8 can say. Raises `TypeError` or `ValueError`."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is text, not {type(value).__name__}")
    if not value.isascii():
        value.encode()
    return value


class Ended(msgspec.Struct, frozen=True):
    """How a turn ended, for those who wait for it. `error` is a code of `DOOR_ERRORS` and a text."""

    replies: tuple[Any, ...]
    error: tuple[str, str] | None = None


LOST = "backend_unavailable", "the journal lost this message; send it again"
"""The error of a turn whose message was accepted, and is not in the journal any more."""


class _Handed:
    """What `turn.stream()` gives: nothing to await unless one wants to go at the reader's pace."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        yield


_HANDED = _Handed()


class Past(Protocol):
    """What was said before; the chat room's memory of it, or the journal."""

    async def history(self, conversation: str, before: int, limit: int) -> list[Entry]: ...


class TurnRun:
    """See `hotdesk_sdk.Turn` for the public part."""

    __slots__ = (
        "_conversation",
        "_past",
        "abandoned",
        "answered_by",
        "attempt",
        "clock",
        "dropped",
        "ended",
        "ending",
        "fence",
        "message",
        "opened",
        "pending",
        "record",
        "refused",
        "remote",
        "rerun",
        "room",
        "roomy",
        "said",
        "shown",
        "silenced",
        "snapshot",
        "started",
        "streamed",
        "streaming",
        "task",
        "text",
        "tries",
        "unanswered",
        "waiters",
        "waiting",
        "watchers",
    )

    def __init__(self, message: Message, record: ConversationRecord, past: Past, attempt: int, started: float) -> None:
        self.message = message
        self.text = message.text
        self.record = record
        self.attempt = attempt
        self.started = started
        self.clock = Clock(None)
        self.answered_by: Slot | None = None
        self.rerun: Any = None
        self.refused: CallFailed | None = None
        self.abandoned = False
        self.dropped = False
        """Another worker runs it now: nothing that comes of it here counts."""
        self.remote = False
        """Its message came in at another worker, which says so when nobody waits for it there any more."""
        self.tries = 0
        """How many tries it had, this one included, that may have ended their worker; 0 for most."""
        self.fence: Any = None
        """What the backend knows it by."""
        self.task: asyncio.Task[None] | None = None
        """Who runs it; None before its first step."""
        self.pending: list[str] = []
        self.streaming = False
        self.opened: list[Any] | None = None
        """Streams that were begun, innermost first; each is closed, whether anybody pulled it to its end or not."""
        self.streamed: Reply | None = None
        self.said: list[str] = []
        """The chunks that were shown of `streamed`."""
        self.shown = 0
        self.room: asyncio.Future[None] | None = None
        """What the stream waits for while nobody who listens can take more."""
        self.roomy = False
        """There was room since the last chunks were told."""
        self.unanswered: tuple[str, str] | None = None
        """The error that stands in for silence: why a bot that would have answered could not."""
        self.silenced = False
        """A plugin decided that an empty answer is none."""
        self.ending = False
        """The answer is decided, and on its way to the disk: nothing can be cancelled any more."""
        self.ended: Ended | None = None
        self.waiters: list[asyncio.Future[Ended | None]] | None = None
        self.waiting = 0
        """Requests that wait for the end, and whose visitors are there."""
        self.watchers: list[Callable[[Event], object]] | None = None
        """Told each event; what a watcher returns is true while it can't take more."""
        self.snapshot: Snapshot
        """The plugins that answer it, from the moment it runs."""
        self._past = past
        self._conversation: ConversationView | None = None

    @property
    def id(self) -> str:
        return self.message.id

    @property
    def conversation(self) -> ConversationView:
        if self._conversation is None:
            self._conversation = ConversationView(self.record)
        return self._conversation

    @property
    def touched(self) -> ConversationView | None:
        """The conversation, if a plugin looked at it."""
        return self._conversation

    async def history(self, limit: int = 20) -> list[Entry]:
        return await self._past.history(self.message.conversation, self.message.seq, max(0, limit))

    def stream(self, text: str) -> Awaitable[None]:
        if not self.streaming:
            raise RuntimeError("turn.stream() works inside respond, while it answers this turn")
        if as_text(text, "what turn.stream() takes"):
            self.pending.append(text)
        return _HANDED

    def note_failure(self, slot: Slot, failure: CallFailed) -> None:
        """Judge a failed call: raises `TurnAborted` when the turn can't go on without that plugin."""
        if self.clock.cancelled:
            raise TurnAborted
        if failure.rerun is not None:
            self.rerun = failure.rerun
            raise TurnAborted
        if slot.on_failure == "refuse":
            self.refused = failure
            raise TurnAborted

    def note_unanswered(self, failure: CallFailed) -> None:
        """A bot was skipped: where it was the language model that failed, silence gets that for its reason."""
        if isinstance(cause := failure.__cause__, LlmError):
            self.unanswered = cause.code, cause.public

    def keep_open(self, stream: Any) -> None:
        """Have *stream* closed when the onion has run, at the latest."""
        if self.opened is None:
            self.opened = [stream]
        else:
            self.opened.append(stream)

    def begin_again(self) -> None:
        """Forget what an aborted run did."""
        self.attempt += 1
        self.text = self.message.text
        self.answered_by = self.rerun = self.refused = self.unanswered = self.streamed = None
        self.pending = []
        self.silenced = False
        self._conversation = None

    def wait_ended(self) -> asyncio.Future[Ended | None]:
        """Resolves when the turn's end is on disk."""
        future: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()
        self.tell_end(future)
        return future

    def watch(self, watcher: Callable[[Event], object]) -> None:
        """Have *watcher* told of what comes of it; of its end now, where it has ended."""
        if self.ended is None:
            self.watchers = [*(self.watchers or ()), watcher]
            return
        for reply in self.ended.replies:
            watcher(Event.of(reply))
        if self.ended.error is not None:
            watcher(Event.error(self.id, *self.ended.error))

    def end(self, ended: Ended) -> None:
        """It is over: tell whoever waits."""
        self.ended = ended
        for waiter in self.waiters or ():
            if not waiter.done():
                waiter.set_result(ended)
        if self.watchers is not None:
            self.watchers.clear()

    def take_audience(self, other: TurnRun) -> None:
        """Who waited for *other*, the same turn, waits for this one."""
        self.waiters, self.waiting = other.waiters, other.waiting
        other.watchers = self.watchers = other.watchers if other.watchers is not None else []
        other.waiters = None

    def tell_end(self, future: asyncio.Future[Ended | None]) -> None:
        """Have *future* resolved when the turn's end is on disk."""
        if self.ended is not None:
            future.set_result(self.ended)
        elif self.waiters is None:
            self.waiters = [future]
        else:
            self.waiters.append(future)
