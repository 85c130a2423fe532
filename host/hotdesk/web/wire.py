"""What goes over the wire: bodies in, JSON out, and the one error shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from aiohttp import web
from msgspec import Meta

from hotdesk_sdk import Attachment, Sender

from ..chat.images import MAX_ATTACHMENTS
from ..chat.intake import NewMessage
from ..errors import BackendUnavailable, DoorError, UnknownPlugin
from ..logs import Logger
from ..metrics import Metrics
from ..runtime.shallow import MAX_DEPTH, is_shallow

__all__ = ["SSE_HEADERS", "MessageBody", "Wire", "decode_message", "integer", "json_response", "seconds", "sse"]

T = TypeVar("T")

JSON_HEADERS = {"Content-Type": "application/json"}
SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Id = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
Name = Annotated[str, Meta(max_length=256)]


class SenderBody(msgspec.Struct, frozen=True):
    id: Name = ""
    name: Name = ""


class MessageBody(msgspec.Struct, frozen=True):
    """The body of `POST …/messages`, and a WebSocket frame of type `message`. Unknown fields are let be."""

    text: str
    id: Id | None = None
    sender: SenderBody = SenderBody()
    attachments: Annotated[tuple[Attachment, ...], Meta(max_length=MAX_ATTACHMENTS)] = ()
    metadata: dict[str, Any] = {}
    locale: Annotated[str, Meta(max_length=35)] | None = None


_encode = msgspec.json.Encoder().encode
_body = msgspec.json.Decoder(MessageBody).decode
_id = msgspec.json.Decoder(Id)


def decode_message(data: bytes | str, conversation: str, max_text_bytes: int) -> NewMessage:
    """A message out of JSON. Raises `DoorError` that says which field is wrong and how."""
    body = decode(_body, data)
    return to_message(body, conversation, max_text_bytes)


def decode(decoder: Callable[[Any], T], data: bytes | str) -> T:
    """JSON by *decoder*, its errors as `DoorError`."""
    try:
        return decoder(data)
    except msgspec.ValidationError as exc:
        raise DoorError("bad_message", str(exc)) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise DoorError("bad_json", str(exc) or "it nests too deeply") from None


def to_message(body: MessageBody, conversation: str, max_text_bytes: int) -> NewMessage:
    """Check what JSON types can't say. Raises `DoorError`."""
    if len(body.text) > max_text_bytes or (
        len(body.text) * 4 > max_text_bytes and len(body.text.encode()) > max_text_bytes
    ):
        raise DoorError("too_large", f"text is over {max_text_bytes} bytes", "the setting is max_text_bytes")
    if not body.text and not body.attachments:
        raise DoorError("bad_message", "text is empty and there is no attachment - at `$.text`")
    for index, attachment in enumerate(body.attachments):
        if (attachment.url is None) == (attachment.data is None):
            raise DoorError("bad_message", f"an attachment has either url or data - at `$.attachments[{index}]`")
    if body.metadata and not is_shallow(body.metadata):
        raise DoorError("bad_message", f"metadata nests deeper than {MAX_DEPTH} - at `$.metadata`")
    sender = Sender(body.sender.id, body.sender.name) if body.sender.id or body.sender.name else NOBODY
    return NewMessage(conversation, body.text, body.id, sender, body.attachments, body.metadata, body.locale)


NOBODY = Sender()


def conversation_of(name: str) -> str:
    """A conversation's id as it may be. Raises `DoorError`."""
    if not 0 < len(name) <= 128 or not name.isprintable() or name.isspace():
        raise DoorError("bad_parameter", "a conversation id is 1 to 128 printable characters")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DoorError("bad_parameter", "a conversation id is valid Unicode") from None
    return name


def check_url(request: web.Request) -> None:
    """Raises `DoorError` when the URL's percent-encoding is not UTF-8: no id that it names could come back right."""
    raw = request.raw_path
    if "%" not in raw:
        return
    try:
        unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise DoorError("bad_parameter", "the URL's percent-encoding is not UTF-8") from None


def integer(query: Any, name: str, default: T, low: int, high: int) -> int | T:
    """A whole number from the query. Raises `DoorError`."""
    raw = query.get(name)
    if raw is None:
        return default
    if not raw.isascii() or not raw.isdigit() or len(raw) > 19 or not low <= int(raw) <= high:
        raise DoorError("bad_parameter", f"{name} is {raw[:40]!r}; it must be a whole number from {low} to {high}")
    return int(raw)


def seconds(query: Any, name: str, high: float) -> float | None:
    """A number of seconds from the query, at most *high*. Raises `DoorError`."""
    raw = query.get(name)
    if raw is None:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise DoorError("bad_parameter", f"{name} is {raw[:40]!r}; it must be a number of seconds")
    return min(value, high)


def json_response(data: Any, status: int = 200) -> web.Response:
    return web.Response(body=_encode(data), status=status, headers=JSON_HEADERS)


def sse(event: str, data: bytes, seq: int = 0) -> bytes:
    """One server-sent event; *data* is JSON, so it has no line break."""
    head = f"id: {seq}\nevent: {event}\ndata: " if seq else f"event: {event}\ndata: "
    return head.encode() + data + b"\n\n"


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Wire:
    """Wraps handlers so that whatever goes wrong is answered in the one shape, and counted."""

    def __init__(self, metrics: Metrics, log: Logger) -> None:
        self._metrics = metrics
        self._log = log

    def error(self, exc: DoorError) -> web.Response:
        self._metrics.errors.labels(exc.code).inc()
        body = exc.body()
        body["message"] = exc.message.encode("utf-8", "replace").decode()  # a header's bytes may be in it
        response = json_response({"error": body}, exc.status)
        if exc.retry_after_s is not None:
            response.headers["Retry-After"] = str(exc.retry_after_s)
        response.headers.update(exc.headers)
        return response

    def as_door_error(self, exc: BaseException, where: str) -> DoorError:
        """What a visitor is told of *exc*. What is our own fault is logged, and not told."""
        if isinstance(exc, DoorError):
            return exc
        if isinstance(exc, BackendUnavailable):
            return DoorError("backend_unavailable", exc.told, retry_after_s=1)
        if isinstance(exc, UnknownPlugin):
            return DoorError("plugin_not_found", str(exc))
        if isinstance(exc, web.HTTPRequestEntityTooLarge):
            return DoorError("too_large", "the body is over its limit", "the setting is max_body_bytes")
        if isinstance(exc, web.RequestPayloadError):
            return DoorError("bad_json", "the body can't be read: its chunks or its compression are broken")
        if isinstance(exc, web.HTTPException):
            return DoorError("bad_parameter", exc.reason or "bad request")
        self._log.error("door_failed", door=where, exc_info=exc)
        return DoorError("internal_error", "this request failed inside hotdesk; the log says where")

    def door(self, handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except Exception as exc:  # the wall of a door: one shape, no traceback
                gone = request.transport is None or request.transport.is_closing()
                if gone and isinstance(exc, ConnectionResetError):
                    return web.Response(status=400)  # nobody reads it
                if isinstance(exc, web.RequestPayloadError):
                    request.content.feed_eof()  # aiohttp would read on, and fail with a traceback in the log
                return self.error(self.as_door_error(exc, request.path))

        return guarded

    async def expect(self, request: web.Request) -> web.StreamResponse | None:
        """Meets `Expect: 100-continue`, and refuses every other expectation."""
        expected = request.headers.get("Expect", "")
        if expected.lower() != "100-continue":
            return self.error(DoorError("bad_parameter", f"Expect is {expected[:40]!r}; it may be 100-continue"))
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # an answer that begins after it is still the first
        return None

    def not_allowed(self, *methods: str) -> Handler:
        """Answers every other method of a path."""

        async def refuse(request: web.Request) -> web.StreamResponse:
            allow = ", ".join(methods)
            return self.error(
                DoorError("method_not_allowed", f"{request.method} is not for this path", headers={"Allow": allow})
            )

        return refuse
