"""What a worker answers its siblings, on a Unix socket of its own: itself, and nobody else.

There is no token: the socket lies in a folder that only this host's user may enter, who could read the keys as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

from .admin import Admin
from .scrape import render_scrape
from .wire import JSON_HEADERS, Wire

__all__ = ["serve_inner"]

_encode = msgspec.json.Encoder(enc_hook=str).encode


async def serve_inner(
    path: str, *, worker: int, admin: Admin, registry: CollectorRegistry, wire: Wire
) -> Callable[[], Awaitable[None]]:
    """Answer on the socket *path*; returns how to stop it, which takes the socket's file away."""

    async def alive(request: web.Request) -> web.StreamResponse:
        return _json({"status": "alive", "worker": worker})

    async def metrics(request: web.Request) -> web.StreamResponse:
        return web.Response(body=render_scrape(registry, worker), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def list_plugins(request: web.Request) -> web.StreamResponse:
        return _json(admin.describe_all())

    async def show(request: web.Request) -> web.StreamResponse:
        return _json(admin.describe_one(request.match_info["name"]))

    async def act(request: web.Request) -> web.StreamResponse:
        await admin.act_here(request.match_info["name"], request.match_info["action"])
        return _json({"worker": worker})

    async def facts(request: web.Request) -> web.StreamResponse:
        return _json(admin.describe_worker())

    app = web.Application()
    for method, route, handler in (
        ("GET", "/healthz", alive),
        ("GET", "/metrics", metrics),
        ("GET", "/admin/plugins", list_plugins),
        ("GET", "/admin/plugins/{name}", show),
        ("POST", "/admin/plugins/{name}/{action}", act),
        ("GET", "/admin/workers", facts),
    ):
        app.router.add_route(method, route, wire.door(handler))
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    await web.UnixSite(runner, path).start()

    async def stop() -> None:
        await runner.cleanup()
        Path(path).unlink(missing_ok=True)

    return stop


def _json(data: Any) -> web.Response:
    return web.Response(body=_encode(data), headers=JSON_HEADERS)
