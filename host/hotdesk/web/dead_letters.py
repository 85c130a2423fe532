"""`/admin/dead-letters`: messages that were given up, to look at and to have answered once more."""

from __future__ import annotations

from aiohttp import web

from ..backend import Backend, DeadLetter
from ..errors import DoorError
from .access import Access
from .conversations import MAX_SEQ
from .wire import conversation_of, json_response

__all__ = ["DeadLetters"]


class DeadLetters:
    """The admin's door to dead letters."""

    def __init__(self, backend: Backend, access: Access) -> None:
        self._backend = backend
        self._access = access

    async def list(self, request: web.Request) -> web.StreamResponse:
        """All of them, oldest first, without what was said."""
        self._access.check_admin(request)
        return json_response({"dead_letters": await self._backend.dead_letters()})

    async def show(self, request: web.Request) -> web.StreamResponse:
        """One, with its message."""
        self._access.check_admin(request)
        conversation, seq = _place(request)
        letter = await self._find(conversation, seq)
        entries = await self._backend.read(conversation, seq - 1, 1)
        return json_response({"dead_letter": letter, "message": entries[0] if entries else None})

    async def requeue(self, request: web.Request) -> web.StreamResponse:
        """Have one answered once more, from its first try."""
        self._access.check_admin(request)
        conversation, seq = _place(request)
        if not await self._backend.requeue(conversation, seq):
            raise _no_such(conversation, seq)
        return json_response({"conversation": conversation, "seq": seq, "status": "requeued"}, 202)

    async def _find(self, conversation: str, seq: int) -> DeadLetter:
        for letter in await self._backend.dead_letters():
            if (letter.conversation, letter.seq) == (conversation, seq):
                return letter
        raise _no_such(conversation, seq)


def _place(request: web.Request) -> tuple[str, int]:
    seq = request.match_info["seq"]
    if not seq.isdecimal() or not 0 < int(seq) <= MAX_SEQ:
        raise DoorError("bad_parameter", f"a seq is a number from 1 on, not {seq[:40]!r}")
    return conversation_of(request.match_info["c"]), int(seq)


def _no_such(conversation: str, seq: int) -> DoorError:
    return DoorError(
        "not_found",
        f"there is no dead letter {seq} in conversation {conversation!r}",
        "`hotdesk dead-letters` lists them",
    )
