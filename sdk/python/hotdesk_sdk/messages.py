"""The values that cross the line between host and plugin: small, typed, and JSON on the wire.

This module owns their shape and nothing else; who stores or sends them is the host's affair.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

__all__ = [
    "Answer",
    "Attachment",
    "InboundMessage",
    "Intake",
    "Message",
    "Reply",
    "Request",
    "Sender",
    "Tool",
]

Json = Any
"""Anything that JSON can say: None, bool, int, float, str, lists and string-keyed dicts of these."""


class Sender(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who wrote a message. `id` is stable for a person on a channel; `name` is for people to read."""

    id: str = ""
    name: str = ""


class Attachment(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something sent along: an image by `url`, or by `data` (base64). Exactly one of the two is set.

    A message that was accepted has no `data` any more: what was uploaded is kept by the host, `url` is where it is
    read, and `mime` and the rest say what its bytes are (`width` and `height` in pixels, `bytes` how many, `hash`
    their SHA-256). An image by a URL of the visitor's is not looked at before somebody needs it: only `url`, and a
    `mime` that is a claim, are set.
    """

    type: Literal["image"]
    url: str | None = None
    data: str | None = None
    mime: str | None = None
    hash: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None


class Message(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """One message as it was accepted. `seq` counts from 1 within a conversation, messages and replies together.

    `at` is seconds since the Unix epoch.
    """

    id: str
    conversation: str
    seq: int
    text: str
    sender: Sender = Sender()
    attachments: tuple[Attachment, ...] = ()
    metadata: dict[str, Json] = {}
    at: float = 0.0


class Reply(msgspec.Struct):
    """An answer: the whole `text`, or `chunks` that are still to come.

    A plugin makes one with `Reply("text")` or `Reply(chunks=async_iterator)`. What `call_next()`
    gives a middleware is one too; there a streamed answer has `chunks` set, and `text` is what
    `await reply.read()` collects. `metadata` is stored and shown to readers as it is.
    """

    text: str = ""
    metadata: dict[str, Json] = {}
    chunks: AsyncIterator[str] | None = None

    @property
    def streamed(self) -> bool:
        """Whether chunks are still to come."""
        return self.chunks is not None

    async def read(self) -> str:
        """Take the whole stream and return the text. Readers then get one reply, and no chunks."""
        if self.chunks is not None:
            parts = [part async for part in self.chunks]
            self.chunks = None
            self.text = "".join(parts)
        return self.text


class InboundMessage(msgspec.Struct, frozen=True):
    """A message that a webhook brought, for `Intake.messages`.

    `id` is the channel's own id of the message: a webhook that is delivered twice then counts once.
    """

    conversation: str
    text: str
    id: str | None = None
    sender: Sender = Sender()
    attachments: tuple[Attachment, ...] = ()
    metadata: dict[str, Json] = {}
    locale: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """The HTTP answer to a webhook or a page. `body` is sent as it is if text or bytes, else as JSON."""

    status: int = 200
    body: Json = None
    headers: dict[str, str] = {}


class Intake(msgspec.Struct, frozen=True):
    """What an `intake` hook returns: `messages` to take in, then the `answer` for whoever called.

    The answer is sent once every message is on disk.
    """

    messages: Sequence[InboundMessage] = ()
    answer: Answer = Answer(status=202)


class Request(msgspec.Struct, frozen=True):
    """A webhook's HTTP request. `path` is what follows `/hooks/{plugin}`; `headers` has lower-case names.

    `query` has the last value of each name; `query_string` is the query as it was sent, which signatures cover.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    query_string: str = ""

    def text(self) -> str:
        """The body as UTF-8. Raises `UnicodeDecodeError` where it is not."""
        return self.body.decode()

    def json(self) -> Json:
        """The body as JSON. Raises `msgspec.DecodeError` where it is not."""
        return msgspec.json.decode(self.body)


class Tool(msgspec.Struct, frozen=True):
    """A function that the language model may call: `parameters` is a JSON Schema of an object."""

    name: str
    description: str
    call: Callable[..., Awaitable[Json]]
    parameters: dict[str, Json] = msgspec.field(default_factory=lambda: {"type": "object", "properties": {}})
