"""`/p/{plugin}/…`: pages of the plugin itself, always of the generation that serves now."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from yarl import URL

from hotdesk_sdk import Answer

from ..errors import CallFailed, DoorError
from ..logs import get_log
from ..runtime.active import Active
from ..runtime.answers import check_answer
from ..runtime.call import Calls, Clock
from .webhooks import answer_response

__all__ = ["PluginPages", "compile_routes"]


def compile_routes(given: Any) -> web.UrlDispatcher:
    """What a `routes` hook returned, as a router. Raises `TypeError` or `ValueError` on what is none.

    A route is `(method, path, handler)`, or what aiohttp's `web.get(path, handler)` and its likes give.
    """
    router = web.UrlDispatcher()
    if isinstance(given, dict):
        given = [("GET", path, handler) for path, handler in given.items()]
    for route in given or ():
        if isinstance(route, web.RouteDef):
            method, path, handler = route.method, route.path, route.handler
        elif isinstance(route, tuple | list) and len(route) == 3:
            method, path, handler = route
        else:
            raise TypeError(f"routes: {route!r} is no route; write (method, path, handler)")
        if not asyncio.iscoroutinefunction(handler):
            raise TypeError(f"routes: the handler of {path!r} is not `async def`")
        router.add_route(method, path, handler)
    return router


class PluginPages:
    """The page door."""

    def __init__(self, active: Active, calls: Calls) -> None:
        self._active = active
        self._calls = calls

    async def handle(self, request: web.Request) -> web.StreamResponse:
        plugin = request.match_info["plugin"]
        snapshot = self._active.acquire()
        try:
            slot = snapshot.by_name.get(plugin)
            router = slot.generation.routes if slot else None
            if slot is None or router is None:
                raise DoorError("not_found", f"plugin '{plugin[:64]}' has no pages")
            path = "/" + request.match_info.get("tail", "")
            page = request.clone(rel_url=URL.build(path=path, query_string=request.query_string))
            match = await router.resolve(page)
            if match.http_exception is not None:
                if isinstance(match.http_exception, web.HTTPMethodNotAllowed):
                    allow = ", ".join(sorted(match.http_exception.allowed_methods))
                    raise DoorError("method_not_allowed", f"this page takes {allow}", headers={"Allow": allow})
                raise DoorError("not_found", f"plugin '{plugin}' has no page {path[:200]}")
            page._match_info = match  # what a sub-application would do; there is no public way
            clock = Clock(asyncio.current_task())
            self._calls.start(clock)
            try:
                answer = await self._calls.call(
                    slot, slot.generation.hooks["routes"], clock, _handled, match.handler, page
                )
            except CallFailed as exc:
                raise DoorError("plugin_failed", exc.public) from exc
            finally:
                self._calls.stop(clock)
            try:
                return to_response(answer)
            except (TypeError, ValueError) as exc:
                get_log().error("page_not_taken", plugin=plugin, problem=str(exc))
                raise DoorError("plugin_failed", f"plugin '{plugin}' failed; the log says why") from exc
        finally:
            self._active.release(snapshot)


async def _handled(handler: Any, page: web.Request) -> Any:
    """A page may raise aiohttp's HTTP exceptions: they are answers, not failures."""
    try:
        return await handler(page)
    except web.HTTPException as exc:
        return web.Response(status=exc.status, headers=exc.headers, text=exc.text)


def to_response(answer: Any) -> web.StreamResponse:
    """What a page handler returned: a response, an `Answer`, HTML or text, or anything that JSON can say."""
    if isinstance(answer, web.StreamResponse):
        return answer
    if isinstance(answer, Answer):
        return answer_response(check_answer(answer))
    if isinstance(answer, str):
        kind = "text/html" if answer.lstrip().startswith("<") else "text/plain"
        return web.Response(text=answer, content_type=kind)
    return answer_response(Answer(200 if answer is not None else 204, answer))
