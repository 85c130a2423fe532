"""A stand-in that speaks the shapes of a host's doors, for what a real host can't be made to do at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

TOKEN = "t0ken"


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Hotdesk = Callable[..., Awaitable[Ran]]


def plugin(name: str, **fields: Any) -> dict[str, Any]:
    """A plugin as `GET /admin/plugins` reports it."""
    return {
        "name": name,
        "state": "ACTIVE",
        "enabled": True,
        "generation": 3,
        "version": "1.2.0",
        "source": f"plugins/{name}",
        "order": 50,
        "order_from": "default",
        "hooks": ["respond"],
        "capabilities": {"asked": [], "granted": []},
        "requires": [],
        "breaker": "closed",
        "calls": 12,
        "failures": 0,
        "error": None,
        "receipt": None,
        "kept": [],
        "leftovers": [],
        "config": {},
    } | fields


@dataclass
class StandIn:
    """What the stand-in was asked, and the plugins that it reports. `url` is where it listens."""

    url: str = ""
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    acts: list[tuple[str, str]] = field(default_factory=list)
    connections: list[dict[str, str]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    record: list[dict[str, Any]] = field(default_factory=list)
    visitor_token: str | None = None
    hold: asyncio.Event = field(default_factory=asyncio.Event)

    def reply(self, to: str, text: str) -> dict[str, Any]:
        entry = {"type": "reply", "id": f"r{to}", "conversation": "c", "seq": len(self.record) + 1, "to": to}
        self.record.append(entry | {"text": text, "plugin": "faq", "generation": 4, "metadata": {}, "at": 0.0})
        return self.record[-1]

    def accept(self, message: dict[str, Any]) -> dict[str, Any]:
        known = next((one for one in self.record if one["type"] == "message" and one["id"] == message["id"]), None)
        if known is None:
            known = {"type": "message", "id": message["id"], "seq": len(self.record) + 1, "text": message["text"]}
            self.record.append(known)
            self.messages.append(message["text"])
        return {"type": "accepted", "id": known["id"], "seq": known["seq"]}


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status)


@asynccontextmanager
async def stand_in_desk() -> AsyncIterator[StandIn]:
    """Speaks the shapes of the contract on a port of its own; what a message says decides what becomes of it."""
    desk = StandIn()

    def admin(handler: Callable[[web.Request], Awaitable[web.Response]]) -> Any:
        async def checked(request: web.Request) -> web.Response:
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                return _error(401, "unauthorized", "the admin token is missing or wrong")
            if (name := request.match_info.get("name")) is not None and name not in desk.plugins:
                return _error(404, "plugin_not_found", f"no plugin is called {name!r}")
            return await handler(request)

        return checked

    async def list_plugins(request: web.Request) -> web.Response:
        return web.json_response({"plugins": list(desk.plugins.values())})

    async def show(request: web.Request) -> web.Response:
        return web.json_response(desk.plugins[request.match_info["name"]])

    async def act(request: web.Request) -> web.Response:
        name, action = request.match_info["name"], request.match_info["action"]
        desk.acts.append((name, action))
        if desk.plugins[name].get("refuses"):
            return _error(422, "unprocessable", desk.plugins[name]["refuses"])
        return web.json_response(desk.plugins[name])

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b': hello\n\nevent: plugin_loaded\ndata: {"kind":"plugin_loaded","plugin":"faq"}\n\n')
        return response

    async def history(request: web.Request) -> web.Response:
        if desk.visitor_token and request.query.get("token") != desk.visitor_token:
            return _error(401, "unauthorized", "a visitor token is wanted")
        return web.json_response({"messages": [], "next": None})

    async def post(request: web.Request) -> web.Response:
        message = await request.json()
        accepted = desk.accept(message)
        if message["text"] == "hold":  # its turn goes on, and so does a wait for its end
            await desk.hold.wait()
        replies = [one for one in desk.record if one.get("to") == accepted["id"]]
        return web.json_response(accepted | {"status": "accepted", "replies": replies})

    async def socket(request: web.Request) -> web.StreamResponse:
        if desk.visitor_token and request.query.get("token") != desk.visitor_token:
            return _error(401, "unauthorized", "a visitor token is wanted")
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        desk.connections.append(dict(request.query))
        for entry in desk.record:
            if entry["type"] == "reply" and entry["seq"] > int(request.query.get("after", 10**9)):
                await ws.send_json(entry)
        async for frame in ws:
            assert frame.type is WSMsgType.TEXT
            await answer(ws, frame.json())
        return ws

    async def answer(ws: web.WebSocketResponse, message: dict[str, Any]) -> None:
        to, text = message["id"], message["text"]
        if text == "vanish" and len(desk.connections) == 1:
            await ws.close(code=1012, message=b"restarting")
            return
        await ws.send_json(desk.accept(message))
        match text:
            case "silence":
                pass
            case "refuse":
                error = {"type": "error", "code": "turn_refused", "message": "plugin 'pay' failed", "to": to}
                await ws.send_json(error)
            case "cut":
                await ws.send_json({"type": "chunk", "to": to, "index": 0, "text": "half of "})
                desk.reply(to, "half of it and the rest")
                await ws.close(code=1013, message=b"too slow")
            case "late":
                await ws.send_json({"type": "chunk", "to": to, "index": 4, "text": "the end of it"})
                await ws.send_json(desk.reply(to, "the beginning and the end of it"))
            case "banned":
                await ws.close(code=1008, message=b"you are banned")
            case "escape":
                await ws.send_json(desk.reply(to, "a\x1b[2Jb\x07"))
            case "anew":
                for index, part in ((0, "old code"), (0, "new "), (1, "code")):
                    await ws.send_json({"type": "chunk", "to": to, "index": index, "text": part})
                await ws.send_json(desk.reply(to, "new code"))
            case _:
                await ws.send_json({"type": "chunk", "to": to, "index": 0, "text": "you said "})
                if text == "hold":
                    await desk.hold.wait()
                await ws.send_json({"type": "chunk", "to": to, "index": 1, "text": text})
                await ws.send_json(desk.reply(to, f"you said {text}"))

    app = web.Application()
    app.router.add_get("/admin/plugins", admin(list_plugins))
    app.router.add_get("/admin/plugins/{name}", admin(show))
    app.router.add_post("/admin/plugins/{name}/{action}", admin(act))
    app.router.add_get("/admin/events", events)
    app.router.add_get("/v1/conversations/{c}/messages", history)
    app.router.add_post("/v1/conversations/{c}/messages", post)
    app.router.add_get("/v1/ws", socket)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    desk.url = f"http://{host}:{port}"
    yield desk
    desk.hold.set()
    await runner.cleanup()
