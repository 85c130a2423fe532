"""`/hooks/{plugin}/…`: a webhook goes to that plugin's `intake`; what it finds in it is taken in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from hotdesk_sdk import Answer, InboundMessage, Intake, Request

from ..chat.background import Background
from ..chat.intake import Intake as Inbox
from ..chat.intake import NewMessage
from ..errors import CallFailed, DoorError
from ..logs import get_log
from ..runtime.answers import check_answer
from ..runtime.shallow import MAX_DEPTH, is_shallow
from .wire import conversation_of, json_response

__all__ = ["Webhooks", "answer_response"]

_decode = msgspec.json.Decoder(InboundMessage).decode


class Webhooks:
    """The webhook door."""

    def __init__(self, *, intake: Inbox, background: Background) -> None:
        self._intake = intake
        self._background = background

    async def handle(self, request: web.Request) -> web.StreamResponse:
        plugin = request.match_info["plugin"]
        if not self._intake.ready:
            raise DoorError("stopping", "the host is not ready to take messages", retry_after_s=1)
        hook_request = Request(
            request.method,
            "/" + request.match_info.get("tail", ""),
            dict(request.query),
            {name.lower(): value for name, value in request.headers.items()},
            await request.read(),
            request.url.raw_query_string,
        )
        try:
            given = await self._background.call_plugin(plugin, "intake", hook_request)
            found = read_intake(given)
        except LookupError:
            raise DoorError("not_found", f"no plugin '{plugin[:64]}' takes webhooks") from None
        except CallFailed as exc:
            raise DoorError("plugin_failed", exc.public) from exc
        except (TypeError, ValueError) as exc:
            get_log().error("intake_not_taken", plugin=plugin, problem=str(exc))
            raise DoorError("plugin_failed", f"plugin '{plugin}' failed; the log says why") from exc
        for new in [_new(message, plugin) for message in found.messages]:
            await self._intake.accept(new, door="webhook", channel=plugin)  # spooled is on disk too
        return answer_response(found.answer)


def _new(message: InboundMessage, plugin: str) -> NewMessage:
    try:
        conversation = conversation_of(message.conversation)
    except DoorError as exc:
        raise DoorError("plugin_failed", f"plugin '{plugin}' gave a message that can't be: {exc}") from None
    return NewMessage(
        conversation, message.text, message.id, message.sender, tuple(message.attachments), message.metadata,
        message.locale,
    )  # fmt: skip


def read_intake(given: Any) -> Intake:
    """What an `intake` hook returned, in any of its forms. Raises `TypeError` or `ValueError`.

    `Intake`; None (nothing found); a list of messages; `(messages, answer)`. A message may be a dict with the
    fields of `InboundMessage`, an answer a status, a text, a dict, or `Answer`.
    """
    if given is None:
        return Intake()
    if isinstance(given, Intake):
        messages, answer = given.messages, given.answer
    elif isinstance(given, tuple) and len(given) == 2:
        messages, answer = given
    elif isinstance(given, list):
        messages, answer = given, Answer(202)
    elif isinstance(given, Answer):
        messages, answer = (), given
    else:
        raise TypeError(f"intake returned a {type(given).__name__}; it may return an Intake, or (messages, answer)")
    return Intake([_message(item) for item in messages], _answer(answer))


def _message(item: Any) -> InboundMessage:
    if not isinstance(item, InboundMessage | Mapping):
        raise TypeError(f"a message is an InboundMessage or a dict, not {type(item).__name__}")
    # There and back: what is kept must be readable for as long as it is kept.
    message = _decode(msgspec.json.encode(item))
    if message.metadata and not is_shallow(message.metadata):
        raise ValueError(f"a message's metadata nests deeper than {MAX_DEPTH}")
    return message


def _answer(item: Any) -> Answer:
    if isinstance(item, Answer):
        return check_answer(item)
    if isinstance(item, int) and not isinstance(item, bool):
        return check_answer(Answer(item))
    return Answer(200, item)


def answer_response(answer: Answer) -> web.Response:
    """An `Answer` as an HTTP response: text and bytes as they are, anything else as JSON."""
    if answer.body is None:
        response = web.Response(status=answer.status)
    elif isinstance(answer.body, str):
        response = web.Response(status=answer.status, text=answer.body)
    elif isinstance(answer.body, bytes):
        response = web.Response(status=answer.status, body=answer.body)
    else:
        response = json_response(answer.body, answer.status)
    response.headers.update(answer.headers)
    return response
