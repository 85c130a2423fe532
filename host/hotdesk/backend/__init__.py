"""What the chat room asks of a journal, and how one is opened by its URL.

A backend keeps the journal (messages, replies, seq), turn ends, idempotency keys, conversation state and
plugins' keys. It decides nothing about turns; it says what is on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from hotdesk_sdk import Message

from ..errors import BackendError
from ..metrics import Metrics

if TYPE_CHECKING:
    from .redis_shelf import RedisShelf

__all__ = [
    "SUSPECT_TRIES",
    "Appended",
    "Backend",
    "ConversationRecord",
    "DeadLetter",
    "Entry",
    "Listener",
    "Outcome",
    "StoredReply",
    "TurnEnd",
    "open_backend",
    "open_shelf",
]


SUSPECT_TRIES = 2
"""A message whose turn was under way at so many ends of a worker is suspected: from then on one such turn runs at a
time, and each of its tries is counted as it begins, so that no other is blamed for it."""


class StoredReply(msgspec.Struct, frozen=True, tag_field="type", tag="reply"):
    """A reply as the record has it. `to` is the id of the message it answers, or None when a plugin spoke first."""

    id: str
    conversation: str
    seq: int
    to: str | None
    text: str
    plugin: str
    generation: int
    metadata: dict[str, Any]
    at: float


Entry = Message | StoredReply


class ConversationRecord(msgspec.Struct, frozen=True):
    """What is kept of a conversation beside its messages. `state` is JSON."""

    id: str
    channel: str = ""
    locale: str | None = None
    assignee: str | None = None
    tags: tuple[str, ...] = ()
    state: bytes = b"{}"


class Appended(msgspec.Struct, frozen=True):
    """The outcome of an append: the message is on disk, now or since the first time its id came."""

    seq: int
    at: float
    duplicate: bool
    opened: bool
    conversation: ConversationRecord
    here: bool = True
    """Its turn is this worker's to run, beginning now. Otherwise another's, or one that was begun before."""

    open: bool = False
    """A repeat whose turn has not ended, wherever it runs."""

    fence: Any = None
    """The backend's own: goes with the turn, and back with its end."""


class TurnEnd(msgspec.Struct, frozen=True):
    """How a turn ends, in one commit: its replies (their seq is given by the backend) and what it changed.

    `to` and `error` are for those who listen elsewhere: which message it was, and why it has no whole answer.
    """

    conversation: str
    seq: int
    replies: tuple[StoredReply, ...] = ()
    changed: ConversationRecord | None = None
    closed: bool = False
    deliver: bool = False
    to: str = ""
    error: tuple[str, str] | None = None
    fence: Any = None
    tries: int = 0
    """Not 0: it is given up after so many tries, and kept as a dead letter."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a message that was accepted before."""

    ended: bool
    replies: tuple[StoredReply, ...]


class DeadLetter(msgspec.Struct, frozen=True):
    """A message whose turn ended its worker again and again. `at` is when it was given up (Unix seconds)."""

    conversation: str
    seq: int
    id: str
    tries: int
    at: float


class Listener(Protocol):
    """Who runs turns here and tells readers: the chat room. Each is called from the loop, and does not wait."""

    def run(
        self, message: Message, record: ConversationRecord, *, attempt: int, opened: bool, fence: Any, own: bool = False
    ) -> None:
        """Begin the turn of a message that came in elsewhere, or before this worker's time (*attempt* 2 and more).

        *own*: it was appended by this worker, which may not have been told so yet. A turn of the same message with
        another fence is given up: the journal lost that message, and took it in anew.
        """

    def redeliver(self, reply: StoredReply, record: ConversationRecord) -> None:
        """Hand out a reply whose channel has not confirmed it."""

    def drop(self, belongs: Callable[[str], bool]) -> None:
        """Give up the turns of the conversations that *belongs* is true of: another worker runs them now."""

    def hear_entry(self, entry: Entry, *, owned: bool, deliver: bool) -> None:
        """A message or a reply outside a turn, of a conversation that somebody listens to here, or is *owned* here."""

    def hear_end(
        self, conversation: str, to: str, replies: tuple[StoredReply, ...], error: tuple[str, str] | None, direct: bool
    ) -> None:
        """A turn ended elsewhere. *direct*: the news is for those who wait for this turn, else for all readers."""

    def hear_chunks(self, conversation: str, to: str, index: int, texts: list[str], direct: bool) -> None:
        """A turn elsewhere says something."""

    def hear_signal(self, conversation: str, signal: str, message: str) -> bool:
        """Another worker asks for something: `cancel`, `leave`; whether there was anything to do."""

    def resync(self, conversation: str) -> None:
        """News of *conversation* may have been missed: read the journal."""

    def resync_turns(self) -> None:
        """News of turns that run elsewhere may have been missed: ask what became of them."""


class Backend(Protocol):
    """The journal. Every future and coroutine raises `BackendUnavailable` when nothing was done.

    `append`, `finish` and `post` are in order: what was asked for first is numbered first.
    """

    url: str
    durability: str
    warnings: tuple[str, ...]
    """What about its settings is unsafe."""

    @property
    def shelf(self) -> RedisShelf | None:
        """Where plugins are pushed for all hosts that share this journal; None where no others can."""

    async def start(self, listener: Listener) -> int:
        """Take part: *listener* is handed what is unfinished, now and whenever this worker takes something over.

        Returns how many turns were taken over at once.
        """

    def append(
        self, message: Message, *, channel: str, locale: str | None, given: bool = True, chunks: bool = False
    ) -> asyncio.Future[Appended]:
        """Keep *message* (its seq is 0) unless its id is known in its conversation; on disk when it resolves.

        *given* False says that the id was made by this host, so it can't be a repeat and need not be looked for.
        *chunks*: who sent it wants them told directly, wherever the turn runs.
        """

    @property
    def alone(self) -> bool:
        """Whether no other worker takes part."""

    def owns(self, conversation: str) -> bool:
        """Whether turns of *conversation* run here now."""

    def home(self, conversation: str) -> int | None:
        """The process on this machine that turns of *conversation* belong to; None where that is none of them."""

    def follow(self, conversation: str, on: bool) -> None:
        """Somebody listens to *conversation* here, from now on or no longer."""

    def tell_chunks(self, fence: Any, conversation: str, to: str, index: int, texts: list[str]) -> None:
        """Tell those who listen on other workers what a turn of this one says. Waits for nobody, fails silently."""

    async def listened_elsewhere(self, conversation: str) -> bool:
        """Whether another worker has readers of a conversation of this one's."""

    async def signal(self, conversation: str, signal: str, message: str) -> bool:
        """Ask the owner of *conversation* for something; what its `hear_signal` said, False if there is none."""

    def finish(self, end: TurnEnd) -> asyncio.Future[tuple[StoredReply, ...] | None]:
        """End a turn. Resolves to its replies with their seq; None when the turn had ended before: nothing was kept.

        Raises `StaleOwner` when the turn is another worker's by now: nothing was kept either.
        """

    def count_try(self, conversation: str, seq: int, fence: Any) -> asyncio.Future[None]:
        """A turn that may be the end of this worker begins: if it is, its next owner knows of which."""

    async def dead_letters(self) -> list[DeadLetter]:
        """Messages that were given up, oldest first."""

    async def requeue(self, conversation: str, seq: int) -> bool:
        """Have a dead letter answered once more, from its first try; False when there is no such."""

    def post(self, reply: StoredReply, *, deliver: bool) -> asyncio.Future[StoredReply | None]:
        """Keep a reply outside a turn; None when there is no such conversation."""

    def delivered(self, conversation: str, seq: int) -> asyncio.Future[None]:
        """A reply reached its channel: it is not handed out again at the next start."""

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry] | None:
        """Entries with a seq above *after*, oldest first; None when the conversation is not known."""

    async def history(self, conversation: str, before: int, limit: int) -> list[Entry]:
        """The newest *limit* entries below the seq *before*, oldest first."""

    async def outcome(self, conversation: str, seq: int, message_id: str) -> Outcome:
        """What became of the message with this *seq*. Raises `MessageLost` when the journal has none."""

    async def record(self, conversation: str) -> ConversationRecord | None: ...
    async def unfinished(self) -> list[tuple[Message, ConversationRecord]]:
        """Messages that were accepted and whose turn has not ended, in order."""

    async def undelivered(self) -> list[tuple[StoredReply, ConversationRecord]]:
        """Replies that a channel has not confirmed, in order."""

    async def purge(self, before: float) -> int:
        """Delete whole conversations in which nothing was said since *before* (Unix seconds); how many."""

    async def ping(self) -> None:
        """Raises `BackendUnavailable` unless a write would be taken now."""

    async def kv_get(self, plugin: str, key: str) -> bytes | None: ...
    async def kv_set(self, plugin: str, key: str, value: bytes | None) -> None: ...
    async def kv_keys(self, plugin: str, prefix: str) -> list[str]: ...
    async def hand_over(self, timeout_s: float) -> None:
        """Leave the turns to other workers: each conversation as soon as nothing of it runs here."""

    async def aclose(self) -> None: ...


async def open_backend(url: str, metrics: Metrics, *, name: str = "") -> Backend:
    """Open the backend that *url* names, for the worker called *name*.

    Raises `BackendError` with the remedy when it can't be used.
    """
    scheme, _, path = url.partition(":///")
    if scheme == "sqlite" and path:
        from .sqlite import SqliteBackend

        return await SqliteBackend.open(path, metrics)
    if _is_redis(url):
        from .redis import RedisBackend

        return await RedisBackend.open(url, metrics, name=name)
    shown = url if "@" not in url else f"{url.partition(':')[0]}:…"  # there may be a password in it
    raise BackendError(f"backend {shown}: write sqlite:///path or redis://host:port/0")


async def open_shelf(url: str) -> RedisShelf:
    """Open the shelf of the journal that *url* names, without being a worker. Raises `BackendError`."""
    if not _is_redis(url):
        raise BackendError("plugins are pushed to hosts that share a Redis; write redis://host:port/0")
    from .redis_shelf import RedisShelf

    return await RedisShelf.open(url)


def _is_redis(url: str) -> bool:
    scheme = url.partition(":")[0]
    return scheme.removesuffix("+cluster").removesuffix("+sentinel") in ("redis", "rediss")
