"""What the runs say to a host, in bytes, and what it says back, typed: messages, the record, plugins, metrics."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from tests.load.client import Answer, HttpClient, request_bytes
from tests.load.history import Accepted, History, Recorded, Replied
from tests.load.hosts import ADMIN_TOKEN, Server

__all__ = ["Desk", "Taken", "message_body", "message_request", "message_target", "note_taken", "read_taken"]

_MARK = re.compile(r"\[(v\d+)\]")


class Entry(msgspec.Struct, frozen=True):
    """A message or a reply, as any door shows it."""

    id: str
    conversation: str
    seq: int
    type: str = "reply"
    to: str | None = None
    text: str = ""
    plugin: str = ""
    generation: int = 0
    metadata: dict[str, Any] = {}

    @property
    def marks(self) -> tuple[str, ...]:
        """What the plugin's code said of its version: in `metadata["marks"]`, and as `[v1]` in the text."""
        if self.type != "reply":
            return ()
        return (*self.metadata.get("marks", ()), *_MARK.findall(self.text))

    @property
    def count(self) -> int:
        """What the plugin counted in the conversation's state; 0 where it does not."""
        return int(self.metadata.get("count", 0))

    @property
    def by(self) -> int:
        """The process that ran the turn; 0 where the plugin does not say."""
        return int(self.metadata.get("process", 0))


class RecordEntry(Entry, frozen=True, kw_only=True):
    """In the record an entry must say what it is; a reply elsewhere need not."""

    type: str


class Taken(msgspec.Struct, frozen=True):
    """The answer to a message: what was accepted, and the replies where somebody waited for them."""

    id: str
    conversation: str
    seq: int
    status: str
    replies: list[Entry] = []


class Page(msgspec.Struct, frozen=True):
    """A page of the record."""

    messages: list[RecordEntry]
    next: int | None = None


class PluginStatus(msgspec.Struct, frozen=True):
    """The part of `GET /admin/plugins/{name}` that the runs look at."""

    generation: int | None = None
    state: str = ""


read_taken = msgspec.json.Decoder(Taken).decode
read_entry = msgspec.json.Decoder(Entry).decode
read_page = msgspec.json.Decoder(Page).decode
_read_status = msgspec.json.Decoder(PluginStatus).decode


def message_body(id: str, text: str) -> bytes:
    """The JSON of one message, as a client would write it."""
    return msgspec.json.encode({"id": id, "text": text})


def message_target(conversation: str, *, wait: bool) -> str:
    """The path of one conversation's messages; with *wait* the answer is to come with the replies."""
    return f"/v1/conversations/{conversation}/messages{'?wait=10' if wait else ''}"


def message_request(conversation: str, id: str, text: str, *, wait: bool = True) -> bytes:
    """One message as a whole HTTP request."""
    return request_bytes("POST", message_target(conversation, wait=wait), message_body(id, text))


def note_taken(history: History, taken: Taken, now: float) -> None:
    """Write down an answer: the promise, and the replies that came with it."""
    history.add(Accepted(conversation=taken.conversation, id=taken.id, time=now, seq=taken.seq))
    for reply in taken.replies:
        history.add(shown(reply, now))


def shown(reply: Entry, now: float) -> Replied:
    """A reply as an event of the history."""
    return Replied(
        conversation=reply.conversation,
        id=reply.id,
        time=now,
        seq=reply.seq,
        to=reply.to,
        generation=reply.generation,
        plugin=reply.plugin,
        text=reply.text,
        marks=reply.marks,
        count=reply.count,
        by=reply.by,
    )


def _expect(answer: Answer, target: str) -> bytes:
    if answer.status != 200:
        raise RuntimeError(f"{target}: {answer.status} {answer.body[:300]!r}")
    return answer.body


class Desk:
    """A host's slower doors: record, admin, metrics."""

    def __init__(self, server: Server) -> None:
        self._client = HttpClient(server.port, f"Authorization: Bearer {ADMIN_TOKEN}\r\n")

    def close(self) -> None:
        self._client.close()

    async def get(self, target: str) -> bytes:
        return _expect(await self._client.request("GET", target), target)

    async def say(self, conversation: str, id: str, text: str) -> Taken:
        """One message, and the answer with its replies."""
        target = message_target(conversation, wait=True)
        return read_taken(_expect(await self._client.request("POST", target, message_body(id, text)), target))

    async def read_entries(self, conversation: str) -> list[RecordEntry]:
        """The whole record of a conversation, as the door gives it; nothing where nothing was ever accepted."""
        entries: list[RecordEntry] = []
        after: int | None = 0
        while after is not None:
            target = f"/v1/conversations/{conversation}/messages?after={after}&limit=500"
            answer = await self._client.request("GET", target)
            if answer.status == 404:
                break
            page = read_page(_expect(answer, target))
            after = page.next
            entries += page.messages
        return entries

    async def read_record(self, conversation: str, now: float) -> list[Recorded]:
        """The same as events of the history."""
        return [
            Recorded(
                conversation=conversation,
                id=entry.id,
                time=now,
                type=entry.type,
                seq=entry.seq,
                to=entry.to,
                generation=entry.generation,
                plugin=entry.plugin,
                text=entry.text if entry.type == "reply" else "",
                marks=entry.marks,
                count=entry.count,
                by=entry.by,
            )
            for entry in await self.read_entries(conversation)
        ]

    async def plugin(self, name: str) -> PluginStatus:
        return _read_status(await self.get(f"/admin/plugins/{name}"))

    async def metric(self, name: str) -> float:
        """One gauge from `/metrics`, summed over its labels."""
        samples = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", (await self.get("/metrics")).decode(), re.MULTILINE)
        if not samples:
            raise RuntimeError(f"/metrics has no {name}")
        return sum(map(float, samples))
