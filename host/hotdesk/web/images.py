"""`/v1/conversations/{c}/images/{hash}`: the images of a conversation, for whoever may read its record."""

from __future__ import annotations

import re

from aiohttp import web

from ..chat.images import Images
from ..errors import DoorError
from .access import Access
from .wire import check_url, conversation_of

__all__ = ["ImageDoor"]

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox",
    "Cache-Control": "private, max-age=31536000, immutable",
}
"""A file may be an image and a page at once: the type is the checked one, no browser guesses another, and opened as a
page it may do nothing. What a hash names never changes; `private`, for a token opened it."""

_is_hash = re.compile(r"[0-9a-f]{64}").fullmatch


class ImageDoor:
    """The door of images."""

    def __init__(self, images: Images, access: Access) -> None:
        self._images = images
        self._access = access

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self._access.check_origin(request)
        check_url(request)
        conversation = conversation_of(request.match_info["c"])
        self._access.visitor(request, conversation)
        hash = request.match_info["hash"]
        image = await self._images.read(conversation, hash) if _is_hash(hash) else None
        if image is None:
            raise DoorError("not_found", "this conversation has no such image")
        headers = {**HEADERS, "ETag": f'"{hash}"'}
        if any(tag.value in (hash, "*") for tag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=image.data, content_type=image.mime, headers=headers)
