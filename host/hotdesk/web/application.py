"""Puts the doors on one aiohttp application."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from aiohttp import web

from ..config import Config
from ..errors import DoorError
from .access import Access
from .admin import Admin
from .conversations import Conversations
from .dead_letters import DeadLetters
from .departure import Departure
from .images import ImageDoor
from .plugin_pages import PluginPages
from .probes import Probes
from .webhooks import Webhooks
from .websocket import WebSockets
from .wire import Wire

__all__ = ["Doors", "make_application"]

VISITOR_PATHS = (
    "/v1/conversations/{c}/messages",
    "/v1/conversations/{c}/messages/{id}/cancel",
    "/v1/conversations/{c}/events",
    "/v1/conversations/{c}/images/{hash}",
)
"""What pages of `allowed_origins` may fetch; a WebSocket needs no leave of the browser."""


@dataclass(slots=True)
class Doors:
    """All doors of one host."""

    wire: Wire
    access: Access
    conversations: Conversations
    images: ImageDoor
    websockets: WebSockets
    webhooks: Webhooks
    pages: PluginPages
    admin: Admin
    dead_letters: DeadLetters
    probes: Probes


def make_application(config: Config, doors: Doors, departure: Departure | None = None) -> web.Application:
    """The routes of design section 2. The router freezes at start, so what plugins add has one catch-all each."""
    app = web.Application(client_max_size=config.max_body_bytes)
    door, refuse = doors.wire.door, doors.wire.not_allowed
    add = partial(app.router.add_route, expect_handler=doors.wire.expect)
    table = {
        "/v1/conversations/{c}/messages": {"POST": doors.conversations.post, "GET": doors.conversations.record},
        "/v1/conversations/{c}/messages/{id}/cancel": {"POST": doors.conversations.cancel},
        "/v1/conversations/{c}/events": {"GET": doors.conversations.events},
        "/v1/conversations/{c}/images/{hash}": {"GET": doors.images.handle},
        "/v1/ws": {"GET": doors.websockets.handle},
        "/admin/plugins": {"GET": doors.admin.list},
        "/admin/plugins/{name}": {"GET": doors.admin.show},
        "/admin/plugins/{name}/{action}": {"POST": doors.admin.act},
        "/admin/dead-letters": {"GET": doors.dead_letters.list},
        "/admin/dead-letters/{c}/{seq}": {"GET": doors.dead_letters.show},
        "/admin/dead-letters/{c}/{seq}/requeue": {"POST": doors.dead_letters.requeue},
        "/admin/events": {"GET": doors.admin.events},
        "/admin/tokens": {"POST": doors.admin.token},
        "/admin/workers": {"GET": doors.admin.workers},
        "/admin/restart": {"POST": doors.admin.restart},
        "/healthz": {"GET": doors.probes.healthz},
        "/readyz": {"GET": doors.probes.readyz},
        "/metrics": {"GET": doors.probes.metrics},
    }
    for path, handlers in table.items():
        for method, handler in handlers.items():
            add(method, path, door(handler))
        if config.allowed_origins and path in VISITOR_PATHS:
            add("OPTIONS", path, door(doors.access.preflight))
        add("*", path, refuse(*handlers))
    for path in ("/hooks/{plugin}", "/hooks/{plugin}/{tail:.*}"):
        add("*", path, door(doors.webhooks.handle))
    for path in ("/p/{plugin}", "/p/{plugin}/{tail:.*}"):
        add("*", path, door(doors.pages.handle))

    if config.allowed_origins:  # a page of another origin asks first, and reads only what it is allowed to
        app.on_response_prepare.append(doors.access.allow_origin)

    if departure is not None:
        app.on_response_prepare.append(departure.tell)

    async def nowhere(request: web.Request) -> web.StreamResponse:
        raise DoorError("not_found", f"there is nothing at {request.path[:200]}", "the doors are in host/README.md")

    add("*", "/{tail:.*}", door(nowhere))
    return app
