"""webhook_channel: a channel over signed webhooks, both ways, after the Standard Webhooks specification.

`intake` takes in what `POST /hooks/webhook_channel` brings if its signature fits; `deliver` posts each reply to `url`,
signed with the same secret. The webhook's id is the message's id, so a webhook that is sent twice counts once.
"""

import base64
import hashlib
import hmac
import time
from typing import Any

import msgspec

from hotdesk_sdk import Answer, Conversation, Ctx, InboundMessage, Intake, Request, Sender, StoredReply, hookimpl

TOLERANCE_S = 300
"""How far a webhook's timestamp may be from now: an old one that was overheard can't be played again."""

PREFIX = "webhook-"
"""Keeps this channel's conversations apart from those of other doors."""


class Said(msgspec.Struct):
    conversation: str
    text: str
    sender: Sender = Sender()


class Event(msgspec.Struct):
    """The body of a webhook: `{"type": "message.created", "data": {"conversation": …, "text": …}}`."""

    type: str
    data: Said


class SignatureInvalid(Exception):
    """A webhook that must not be believed."""


def read_secret(config: dict[str, Any]) -> bytes:
    try:
        secret = base64.b64decode(config["secret"].removeprefix("whsec_"), validate=True)
    except (AttributeError, ValueError) as exc:
        raise ValueError("`secret` is not base64; it is written whsec_… and base64") from exc
    if not 24 <= len(secret) <= 64:
        raise ValueError(f"`secret` has {len(secret)} bytes; set one of 24 to 64 bytes, as whsec_ and their base64")
    return secret


def sign(secret: bytes, id: str, timestamp: int, body: bytes) -> str:
    signed = hmac.digest(secret, f"{id}.{timestamp}.".encode() + body, hashlib.sha256)
    return "v1," + base64.b64encode(signed).decode()


def verify(secret: bytes, request: Request, now: float) -> str:
    """The id of a webhook whose signature fits. Raises `SignatureInvalid`."""
    headers = request.headers
    try:
        id, timestamp = headers["webhook-id"], int(headers["webhook-timestamp"])
        signatures = headers["webhook-signature"].split()
    except (KeyError, ValueError) as exc:
        raise SignatureInvalid("webhook-id, webhook-timestamp or webhook-signature is missing or malformed") from exc
    if abs(now - timestamp) > TOLERANCE_S:
        raise SignatureInvalid("webhook-timestamp is more than five minutes from now")
    expected = sign(secret, id, timestamp, request.body).encode()
    if not any(hmac.compare_digest(expected, signature.encode()) for signature in signatures):
        raise SignatureInvalid("no signature in webhook-signature fits")
    return id


def refuse(status: int, code: str, message: str) -> Intake:
    return Intake(answer=Answer(status, {"error": {"code": code, "message": message}}))


@hookimpl
async def setup(ctx: Ctx) -> None:
    """Without a good secret it does not serve at all."""
    read_secret(ctx.config)


@hookimpl
async def intake(ctx: Ctx, request: Request) -> Intake:
    try:
        id = verify(read_secret(ctx.config), request, time.time())
        event = msgspec.json.decode(request.body, type=Event)
    except SignatureInvalid as exc:
        return refuse(401, "signature_invalid", str(exc))
    except msgspec.ValidationError as exc:
        return refuse(400, "bad_message", str(exc))
    except msgspec.DecodeError as exc:
        return refuse(400, "bad_json", str(exc))
    if event.type != "message.created":
        return Intake(answer=Answer(204))  # signed and understood, and nothing to answer
    said = event.data
    return Intake([InboundMessage(PREFIX + said.conversation, said.text, id=id, sender=said.sender)])


@hookimpl
async def deliver(ctx: Ctx, conversation: Conversation, reply: StoredReply) -> None:
    """What raises here is tried again, with the same webhook-id: the channel can tell a repeat."""
    data = {"conversation": conversation.id.removeprefix(PREFIX), "to": reply.to, "text": reply.text}
    body = msgspec.json.encode({"type": "reply.created", "timestamp": reply.at, "data": data})
    now = int(time.time())
    headers = {
        "content-type": "application/json",
        "webhook-id": reply.id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign(read_secret(ctx.config), reply.id, now, body),
    }
    answer = await ctx.http.post(ctx.config["url"], body=body, headers=headers, timeout=4)
    if answer.status >= 300:
        raise RuntimeError(f"the channel answered {answer.status}")
