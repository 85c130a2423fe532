"""Who hears of what: readers of a conversation get every entry once, in order, and chunks as they come.

A reader that misses something (it just came, or it is slow) reads the journal until it has caught up, so nothing
has to be buffered for it, and nothing is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from hotdesk_sdk import Message

from ..backend import Backend, Entry
from ..errors import BackendUnavailable
from ..logs import get_log
from ..runtime.guards import host_task

__all__ = ["Chunk", "Event", "Outbox", "Reader", "Sink"]

NEWEST = 2**53
"""Above every seq, and a whole number to a Lua script too."""

PAGE = 200
"""Entries read from the journal at a time while catching up."""

_encode = msgspec.json.Encoder().encode


class Chunk(msgspec.Struct, frozen=True, tag_field="type", tag="chunk"):
    """A piece of a streamed reply, or several in one; `index` counts pieces, and is that of the first."""

    to: str
    index: int
    text: str


class Event:
    """Something to tell: an entry, a chunk or an error. Encoded once, however many hear of it."""

    __slots__ = ("_data", "data", "kind", "seq", "wire")

    def __init__(self, kind: str, data: Entry | Chunk | dict[str, Any], seq: int = 0) -> None:
        self.kind = kind
        self.data: Any = data
        self.seq = seq
        self.wire: bytes | None = None
        """What a door made of the frame, kept for the next of its visitors."""
        self._data: bytes | None = None

    @property
    def frame(self) -> bytes:
        """The JSON of it, `type` included: a WebSocket frame, and the data of a server-sent event."""
        if self._data is None:
            self._data = _encode(self.data)
        return self._data

    @property
    def to(self) -> str | None:
        """The message that it belongs to."""
        data = self.data
        return data.get("to") if isinstance(data, dict) else getattr(data, "to", None)

    @classmethod
    def of(cls, entry: Entry) -> Event:
        return cls("message" if isinstance(entry, Message) else "reply", entry, entry.seq)

    @classmethod
    def chunk(cls, to: str, index: int, text: str) -> Event:
        return cls("chunk", Chunk(to, index, text))

    @classmethod
    def error(cls, to: str | None, code: str, message: str) -> Event:
        data = {"type": "error", "code": code, "message": message}
        return cls("error", data if to is None else data | {"to": to})


class Sink(Protocol):
    """Where a reader's events go; a door's."""

    def send(self, event: Event) -> bool:
        """Send without waiting; true while there is more than the other side takes, so that more had better wait."""

    def send_chunks(self, events: list[Event]) -> bool:
        """Send chunks that came together. What the other side is too slow for comes to it in fewer, larger ones."""

    async def drain(self) -> None:
        """Wait until the other side has taken most of it."""


class Reader:
    """One reader of one conversation, from `after` on; None means from now on."""

    __slots__ = ("_backend", "_catching", "_dirty", "_last", "_looking", "_messages", "_sink", "conversation")

    def __init__(self, conversation: str, after: int | None, *, messages: bool, sink: Sink, backend: Backend) -> None:
        self.conversation = conversation
        self._last = after
        self._messages = messages
        self._sink = sink
        self._backend = backend
        self._catching: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._dirty = False

    def anchor(self, seq: int) -> None:
        """The entry *seq* was made after this reader came: what follows is not to be missed, whoever tells it."""
        if self._last is None:
            self._last = seq - 1

    def resync(self) -> None:
        """News may have been missed: read the journal."""
        if self._catching is not None:
            self._dirty = True
        elif self._last is not None:
            self._catch_up()
        elif self._looking is None:
            self._looking = host_task(self._read_newest())

    async def _read_newest(self) -> None:
        """From now on is from the newest entry on, if nothing was told by then. What is told meanwhile is passed on."""
        try:
            newest = await self._backend.history(self.conversation, NEWEST, 1)
        except BackendUnavailable:
            newest = []  # the next connection begins with this again
        self._looking = None
        if newest and self._last is None:
            self._last = newest[-1].seq
        elif newest and self._last is not None and self._last < newest[-1].seq:
            self._catch_up()

    def start(self) -> None:
        """Read what was missed."""
        if self._last is not None:
            self._catch_up()

    def close(self) -> None:
        for task in (self._catching, self._looking):
            if task is not None:
                task.cancel()

    def hear_chunks(self, events: list[Event]) -> bool:
        """Take chunks in; true while this reader can't take more. One that catches up has its chunks as a reply."""
        return self._catching is None and self._sink.send_chunks(events)

    def hear(self, event: Event) -> None:
        """Take an event in, in the order of commits."""
        if self._catching is not None:
            self._dirty = True
            if event.kind == "error":  # it is in no journal: who is not told now is never told
                self._sink.send(event)
            return
        if not event.seq:
            self._sink.send(event)
        elif self._last is None or event.seq == self._last + 1:
            self._pass_on(event)
        elif event.seq > self._last:
            self._catch_up()

    def _pass_on(self, event: Event) -> None:
        self._last = event.seq
        if self._messages or event.kind == "reply":
            self._sink.send(event)

    def _catch_up(self) -> None:
        if self._catching is None:
            self._catching = host_task(self._read())

    async def _read(self) -> None:
        try:
            while True:
                self._dirty = False
                try:
                    page = await self._backend.read(self.conversation, self._last or 0, PAGE)
                except BackendUnavailable:
                    await asyncio.sleep(0.5)
                    continue
                for entry in page or ():
                    self._pass_on(Event.of(entry))
                    await self._sink.drain()
                if not page and not self._dirty:
                    return
        finally:
            self._catching = None


class Outbox:
    """The readers of all conversations of this host."""

    def __init__(self) -> None:
        self._readers: dict[str, list[Reader]] = {}
        self.on_listen: Callable[[str, bool], None] = lambda conversation, on: None
        """Called when the first reader came to a conversation, and when the last one left."""
        self.on_change: Callable[[str], None] = lambda conversation: None
        """Called when somebody came to a conversation or left it."""

    def join(self, reader: Reader) -> Callable[[], None]:
        """Have *reader* hear of its conversation; returns how to leave."""
        readers = self._readers.get(reader.conversation)
        if readers is None:
            self._readers[reader.conversation] = [reader]
            self.on_listen(reader.conversation, True)
        else:
            readers.append(reader)
        reader.start()
        self.on_change(reader.conversation)

        def leave() -> None:
            reader.close()
            readers = self._readers.get(reader.conversation)
            if readers is not None and reader in readers:
                readers.remove(reader)
                if not readers:
                    del self._readers[reader.conversation]
                    self.on_listen(reader.conversation, False)
                self.on_change(reader.conversation)

        return leave

    def listened(self, conversation: str) -> bool:
        return conversation in self._readers

    def anchor(self, conversation: str, seq: int) -> None:
        """An entry was made by somebody here, and is told by somebody else."""
        for reader in self._readers.get(conversation, ()):
            reader.anchor(seq)

    def resync(self, conversation: str) -> None:
        """News of *conversation* may have been missed."""
        for reader in self._readers.get(conversation, ()):
            reader.resync()

    def tell_chunks(self, conversation: str, events: list[Event]) -> bool:
        """Tell every reader chunks that came together; true when there are readers, and none can take more."""
        readers = self._readers.get(conversation)
        if readers is None:
            return False
        full = True
        for reader in readers:  # a sink only writes: nobody joins or leaves on the way
            try:
                full = reader.hear_chunks(events) and full
            except Exception as exc:
                full = False
                get_log().error("reader_failed", conversation=conversation, exc_info=exc)
        return full

    def tell(self, conversation: str, event: Event) -> None:
        for reader in tuple(self._readers.get(conversation, ())):
            try:
                reader.hear(event)
            except Exception as exc:  # a door's fault ends what it tells one reader, not the turn that tells it
                get_log().error("reader_failed", conversation=conversation, exc_info=exc)
