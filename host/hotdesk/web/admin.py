"""`/admin/…`: the operator's JSON, behind the admin token."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from hotdesk_sdk import HotdeskError

from ..config import Config
from ..errors import DoorError, UnknownPlugin
from ..metrics import Metrics
from ..runtime.active import Generation
from ..runtime.entries import Entry
from ..runtime.events import Events
from ..runtime.generations import Maker
from ..runtime.reload import NothingToRollBackTo, PluginDisabled, Plugins
from .access import Access
from .wire import SSE_HEADERS, conversation_of, decode, json_response, sse

__all__ = ["Admin"]

MAX_BEHIND = 1000
"""Events kept for a listener that reads slowly; then its stream ends."""

ACTIONS = ("reload", "enable", "disable", "rollback")

_encode = msgspec.json.Encoder(enc_hook=str).encode


class TokenRequest(msgspec.Struct, frozen=True):
    conversation: str
    visitor: Annotated[str, Meta(min_length=1, max_length=256)]
    seconds: Annotated[int, Meta(ge=1, le=7 * 86400)] | None = None


_token = msgspec.json.Decoder(TokenRequest).decode


class Admin:
    """The admin door."""

    def __init__(
        self, config: Config, *, plugins: Plugins, maker: Maker, events: Events, access: Access, metrics: Metrics
    ) -> None:
        self._config = config
        self._plugins = plugins
        self._maker = maker
        self._events = events
        self._access = access
        self._metrics = metrics
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self._stopping.set()

    def describe(self, entry: Entry) -> dict[str, Any]:
        """A plugin as `GET /admin/plugins` shows it."""
        current, slot = entry.current, entry.slot
        calls, failures = self._metrics.calls(entry.name)
        manifest = current.manifest if current else None
        return {
            "name": entry.name,
            "state": entry.state().value,
            "enabled": not entry.disabled,
            "generation": current.number if current else None,
            "version": manifest.version if manifest else None,
            "source": str(entry.source.path) if entry.source else None,
            "order": slot.order if slot else None,
            "order_from": slot.order_from if slot else None,
            "timeout_ms": round(slot.timeout_s * 1000) if slot else None,
            "on_failure": slot.on_failure if slot else None,
            "hooks": list(current.hooks) if current else [],
            "tools": [tool.name for tool in current.tools] if current else [],
            "component": _component(current),
            "capabilities": {
                "asked": list(manifest.capabilities) if manifest else [],
                "granted": sorted(self._maker.granted(current)) if current else [],
            },
            "requires": list(manifest.requires) if manifest else [],
            "waiting_for": entry.waiting_for if current is None else None,
            "breaker": slot.breaker.state if slot else "closed",
            "calls": calls,
            "failures": failures,
            "last_failure": _last_failure(current),
            "probation_left": current.probation_left if current else 0,
            "pending": entry.pending,
            "error": entry.problem.public() if entry.problem else None,
            "receipt": entry.receipt.public() if entry.receipt else None,
            "kept": [kept.public() for kept in entry.kept],
            "leftovers": entry.leftovers,
        }

    async def list(self, request: web.Request) -> web.StreamResponse:
        self._access.check_admin(request)
        slots = {entry.name: entry.slot for entry in self._plugins.entries}
        ordered = sorted(
            self._plugins.entries,
            key=lambda entry: (slots[entry.name] is None, entry.slot.order if entry.slot else 0, entry.name),
        )
        return json_response(
            {"plugins": [self.describe(entry) for entry in ordered], "watch": self._plugins.watch_mode}
        )

    async def show(self, request: web.Request) -> web.StreamResponse:
        self._access.check_admin(request)
        return self._shown(request.match_info["name"])

    def _shown(self, name: str) -> web.Response:
        try:
            entry = self._plugins.entry(name)
        except UnknownPlugin as exc:
            raise DoorError("plugin_not_found", str(exc)) from exc
        body = self.describe(entry)
        body["config"] = self._maker.config_of(entry.current) if entry.current else {}
        return web.Response(body=_encode(body), content_type="application/json")

    async def act(self, request: web.Request) -> web.StreamResponse:
        self._access.check_admin(request)
        name, action = request.match_info["name"], request.match_info["action"]
        if action not in ACTIONS:
            raise DoorError("not_found", f"there is no action {action[:40]!r}; there are {', '.join(ACTIONS)}")
        try:
            await getattr(self._plugins, action)(name)
        except UnknownPlugin:
            raise
        except (NothingToRollBackTo, PluginDisabled) as exc:
            raise DoorError("conflict", str(exc)) from exc
        except HotdeskError as exc:
            raise DoorError("unprocessable", str(exc)) from exc
        return self._shown(name)

    async def events(self, request: web.Request) -> web.StreamResponse:
        self._access.check_admin(request)
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        queue: deque[dict[str, Any]] = deque(maxlen=MAX_BEHIND)
        wake = asyncio.Event()

        def hear(event: dict[str, Any]) -> None:
            queue.append(event)
            wake.set()

        stop = self._events.listen(hear)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await response.write(b": listening\n\n")
            while not stopping.done():
                while queue:
                    event = queue.popleft()
                    await response.write(sse(event["kind"], _encode(event)))
                wake.clear()
                woken = asyncio.ensure_future(wake.wait())
                done, _ = await asyncio.wait({woken, stopping}, timeout=15.0, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
                if not done:
                    await response.write(b": still here\n\n")
        except ConnectionResetError:
            pass
        finally:
            stop()
            stopping.cancel()
        return response

    async def token(self, request: web.Request) -> web.StreamResponse:
        """`POST /admin/tokens`: a visitor token."""
        self._access.check_admin(request)
        wanted = decode(_token, await request.read())
        token, expires = self._access.issue(
            conversation_of(wanted.conversation), wanted.visitor, wanted.seconds or self._config.visitor_token_s
        )
        return json_response({"token": token, "expires": expires}, 201)


def _last_failure(current: Generation | None) -> dict[str, Any] | None:
    if current is None or current.last_failure is None:
        return None
    at, problem = current.last_failure
    return {"at": at, "problem": problem}


def _component(current: Generation | None) -> dict[str, Any] | None:
    """What a WebAssembly component says of itself; None for Python."""
    found = current.bundle.component if current is not None else None
    if found is None or current is None:
        return None
    instances = current.guest.instances if current.guest is not None else 0
    return {
        "contract": found.version,
        "exports": list(found.exports),
        "imports": list(found.imports),
        "instances": instances,
    }
