"""What the chat room asks of a journal, and how one is opened by its URL.

A backend keeps the journal (messages, replies, seq), turn ends, idempotency keys, conversation state and
plugins' keys. It decides nothing about turns; it says what is on disk.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal, Protocol

import msgspec

from hotdesk_sdk import Message

from ..errors import BackendError
from ..metrics import Metrics

__all__ = [
    "Appended",
    "Backend",
    "ConversationRecord",
    "Entry",
    "Outcome",
    "StoredReply",
    "TurnEnd",
    "open_backend",
]


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


class TurnEnd(msgspec.Struct, frozen=True):
    """How a turn ends, in one commit: its replies (their seq is given by the backend) and what it changed."""

    conversation: str
    seq: int
    replies: tuple[StoredReply, ...] = ()
    changed: ConversationRecord | None = None
    closed: bool = False
    deliver: bool = False


class Outcome(msgspec.Struct, frozen=True):
    """What became of a message that was accepted before."""

    ended: bool
    replies: tuple[StoredReply, ...]


class Backend(Protocol):
    """The journal. Every future and coroutine raises `BackendUnavailable` when nothing was done.

    `append`, `finish` and `post` are in order: what was asked for first is numbered first.
    """

    url: str
    durability: str

    def append(
        self, message: Message, *, channel: str, locale: str | None, given: bool = True
    ) -> asyncio.Future[Appended]:
        """Keep *message* (its seq is 0) unless its id is known in its conversation; on disk when it resolves.

        *given* False says that the id was made by this host, so it can't be a repeat and need not be looked for.
        """

    def finish(self, end: TurnEnd) -> asyncio.Future[tuple[StoredReply, ...] | None]:
        """End a turn. Resolves to its replies with their seq; None when the turn had ended before: nothing was kept."""

    def post(self, reply: StoredReply, *, deliver: bool) -> asyncio.Future[StoredReply | None]:
        """Keep a reply outside a turn; None when there is no such conversation."""

    def delivered(self, conversation: str, seq: int) -> asyncio.Future[None]:
        """A reply reached its channel: it is not handed out again at the next start."""

    async def read(self, conversation: str, after: int, limit: int) -> list[Entry] | None:
        """Entries with a seq above *after*, oldest first; None when the conversation is not known."""

    async def history(self, conversation: str, before: int, limit: int) -> list[Entry]:
        """The newest *limit* entries below the seq *before*, oldest first."""

    async def outcome(self, conversation: str, seq: int, message_id: str) -> Outcome:
        """What became of the message with this *seq*."""

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
    async def aclose(self) -> None: ...


Kind = Literal["sqlite"]


async def open_backend(url: str, metrics: Metrics) -> Backend:
    """Open the backend that *url* names. Raises `BackendError` with the remedy when it can't be used."""
    scheme, _, path = url.partition(":///")
    if scheme == "sqlite" and path:
        from .sqlite import SqliteBackend

        return await SqliteBackend.open(path, metrics)
    raise BackendError(f"backend {url}: this version has sqlite:///path only")
